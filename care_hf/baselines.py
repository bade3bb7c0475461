"""Rivals and controls that share CARE's frame: subspaces at the same sites, applied by the same wrapper."""

import torch

from .fitting import Statistics
from .projection import Subspace
from .recipe import Recipe
from .subspace import SafetySubspaces


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
            difference = moments["malicious"].mean - mean
            norm = torch.linalg.vector_norm(difference)
            if norm == 0:
                raise ValueError(f"Benign and malicious {modality} activations have the same mean at site {site}.")
            sites[site][modality] = Subspace((difference / norm)[:, None].float(), mean.float(), recipe.beta)
    return SafetySubspaces(sites, recipe.fusion, recipe.fusion_weight, recipe.strength)
