"""Rivals and controls that share CARE's frame: subspaces at the same sites, applied by the same wrapper."""

from dataclasses import replace

import torch

from .fitting import Statistics
from .projection import Subspace
from .recipe import Recipe
from .subspace import SafetySubspaces, random_like
from .turns import Turns


def mean_difference(statistics: Statistics, recipe: Recipe) -> SafetySubspaces:
    """Project out the normalised difference of the class means, rank 1 per modality.

    Same sites, tokens, benign mean, beta and fusion as CARE under `recipe`, so that only the direction differs.

    Raises:
        ValueError: the two means of a site are equal, so that there is no direction.
    """
    sites = {}
    for site, by_modality in statistics.moments.items():
        sites[site] = {}
        for modality, moments in by_modality.items():
            mean = moments["benign"].mean
            direction = _direction(moments["malicious"].mean - mean, f"{modality} activations at site {site}")
            beta = 0.0 if recipe.anchor == "none" else recipe.beta
            sites[site][modality] = Subspace(direction, mean.float(), beta)
    return SafetySubspaces(sites, recipe.fusion, recipe.fusion_weight, recipe.strength)


def gated_mean_difference(turns: Turns, subspaces: SafetySubspaces) -> SafetySubspaces:
    """Behind the same gate and towards the same anchors, but along one direction: complying minus refused mean.

    Raises:
        ValueError: the two means of a place are equal.
    """
    sites = {}
    for site, by_place in subspaces.sites.items():
        sites[site] = {}
        for place, subspace in by_place.items():
            difference = _deviations(turns, site, place, subspace).mean(dim=0)
            direction = _direction(difference, f"the {place} at site {site}")
            sites[site][place] = Subspace(direction, subspace.mean, subspace.beta)
    return replace(subspaces, sites=sites, metadata={"origin": "mean difference"})


def gated_random(turns: Turns, subspaces: SafetySubspaces, seed: int = 0) -> SafetySubspaces:
    """Behind the same gate and towards the same anchors, but in random subspaces of equal rank, and as far.

    The strength is raised until the mean norm of the correction at the last token of complying prompts is that of
    `subspaces` (at the first site): damage must not count as safety, nor a shorter step as harmless.
    """
    control = random_like(subspaces, seed)
    site = min(subspaces.sites)
    norms = []
    for candidate in (subspaces, control):
        place = next(iter(candidate.sites[site]))
        subspace = candidate.sites[site][place]
        reader = subspace.basis if subspace.reader is None else subspace.reader
        target = replace(subspace, mean=subspace.beta * subspace.mean)
        coefficients = _deviations(turns, site, place, target) @ reader
        norms.append(torch.linalg.vector_norm(coefficients, dim=-1).mean().item())
    return replace(control, strength=subspaces.strength * norms[0] / norms[1])


def _deviations(turns: Turns, site, place: str, subspace: Subspace) -> torch.Tensor:
    """What complying prompts differ by from the anchor, (n, d), over all steps of the place."""
    complying = turns.of("benign", "malicious") & ~turns.refused
    recorded = turns.repaired[site][complying]
    about = recorded[:, :1] if place == "last" else recorded[:, 1 : 1 + subspace.steps]
    tokens = (about - subspace.mean).flatten(0, 1)
    return tokens[~tokens[:, 0].isnan()]


def _direction(difference: torch.Tensor, where: str) -> torch.Tensor:
    norm = torch.linalg.vector_norm(difference)
    if norm == 0:
        raise ValueError(f"The two means of {where} are the same, so there is no direction between them.")
    return (difference / norm)[:, None].float()
