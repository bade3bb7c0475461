"""From recorded turns to a gate and the subspaces that it guards."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from .detectors import assemble, calibration, cross_fit, fit_detectors, thresholds
from .gating import Gate
from .linalg import RunningCovariance
from .projection import Subspace
from .recipe import Recipe
from .sites import Site
from .subspace import SafetySubspaces, fit_subspace
from .turns import Turns


def solve_turns(turns: Turns, recipe: Recipe) -> SafetySubspaces:
    """Solve for the gate and the subspaces; cheap, so that one recording serves many recipes.

    The metadata says how the gate was calibrated, as JSON under "calibration", and how every subspace came about, under
    "reports": see `subspace.FitReport` for those of the basis "filter"; of patterns, the mean square of what complying
    tokens deviate by from the anchor, along each direction ("eigenvalues") and altogether ("total"), of so many tokens.

    Raises:
        ValueError: prompts are too few for the rank or for holding some out.
    """
    gate, notes = fit_gate(turns, recipe)
    solved = {site: _solve_places(turns, site, recipe) for site in turns.repaired}
    sites = {site: {name: subspace for name, (subspace, _) in places.items()} for site, places in solved.items()}
    reports = {f"{site}.{name}": report for site, places in solved.items() for name, (_, report) in places.items()}
    counts = {name: int(turns.of(name).sum()) for name in dict.fromkeys(cell.of for cell in turns.cells)}
    metadata = {
        "recipe": json.dumps(recipe.to_dict()),
        "prompts": json.dumps({**counts, "refused": int(turns.refused.sum())}),
        "calibration": json.dumps(notes),
        "reports": json.dumps(reports),
        **turns.origin,
    }
    return SafetySubspaces(
        sites, "route", strength=recipe.strength, metadata=metadata, gate=gate, gate_site=turns.gate_site
    )


def fit_gate(turns: Turns, recipe: Recipe) -> tuple[Gate, dict]:
    """The gate of `recipe`, its thresholds set on held-out prompts, and the calibration as plain values."""
    detectors = fit_detectors(turns.prompts, recipe.gate_ridge)
    if recipe.gate == "none":
        return assemble(turns.prompt_end, detectors, torch.zeros(len(detectors.all))).ungated(), {}
    held_out = cross_fit(turns.prompts, recipe.gate_ridge)
    set_at = thresholds(held_out, recipe.false_alarms)
    return assemble(turns.prompt_end, detectors, set_at), calibration(held_out, recipe.false_alarms)


def fit_places(turns: Turns, site: Site, recipe: Recipe) -> dict[str, Subspace]:
    """The subspaces of the last token and of the response at one site, in the recipe's scope.

    Raises:
        ValueError: fewer prompts than the rank.
    """
    return {name: subspace for name, (subspace, _) in _solve_places(turns, site, recipe).items()}


def _solve_places(turns: Turns, site: Site, recipe: Recipe) -> dict[str, tuple[Subspace, dict[str, Any]]]:
    """The subspaces, and how they came about as plain values."""
    recorded = turns.repaired[site].double()
    complying = turns.of("benign", "malicious") & ~turns.refused
    if int(complying.sum()) < recipe.rank:
        raise ValueError(
            f"rank={recipe.rank} exceeds the {int(complying.sum())} prompts that the model complies with; give more."
        )
    anchors = _anchors(turns, recorded, recipe)
    places = {}
    if "last" in recipe.scope:
        classes = {"benign": turns.of("benign"), "malicious": turns.of("malicious") & ~turns.refused}
        tokens = {name: recorded[rows, 0] for name, rows in classes.items()}
        places["last"] = _subspace(tokens, recorded[complying, 0] - anchors[0], anchors[0], recipe)
    if "response" in recipe.scope:
        # The place in the refusal is no signal, so every token is taken about the anchor of its step.
        about = recorded[:, 1 : len(anchors)] - anchors[1:]
        classes = {"benign": turns.of("benign"), "malicious": turns.of("malicious") & ~turns.refused}
        tokens = {name: _known(about[rows]) for name, rows in classes.items()}
        places["response"] = _subspace(tokens, _known(about[complying]), anchors[1:], recipe)
    return places


def _anchors(turns: Turns, recorded: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """What every step is pulled towards, (1 + T, d); T ends where half of the refusals have."""
    refusing = recorded[turns.refused]
    lasting = (~refusing[..., 0].isnan()).double().mean(dim=0) >= 0.5
    steps = int(lasting.sum())
    if recipe.anchor == "none":
        return torch.zeros_like(recorded[0, :steps])
    rows = turns.refused if recipe.anchor == "refused" else turns.of("benign")
    return recorded[rows, :steps].nanmean(dim=0)


def _known(steps: torch.Tensor) -> torch.Tensor:
    tokens = steps.flatten(0, 1)
    return tokens[~tokens[:, 0].isnan()]


def _subspace(
    tokens: Mapping[str, torch.Tensor], deviations: torch.Tensor, anchors: torch.Tensor, recipe: Recipe
) -> tuple[Subspace, dict[str, Any]]:
    if recipe.basis == "pattern":
        _, singular, directions = torch.linalg.svd(deviations, full_matrices=False)
        squares = singular.square() / len(deviations)
        kept = squares[: recipe.rank].tolist()
        report = {"eigenvalues": kept, "total": squares.sum().item(), "tokens": len(deviations)}
        return Subspace(directions[: recipe.rank].mT, anchors, recipe.beta), report
    moments = {name: RunningCovariance(deviations.shape[1]) for name in tokens}
    for name, h in tokens.items():
        moments[name].update(h)
    fitted, report = fit_subspace(
        moments["benign"],
        moments["malicious"],
        rank=recipe.rank,
        centring=recipe.centring,
        shrinkage=recipe.shrinkage,
        projector=recipe.projector,
    )
    return Subspace(fitted.basis, anchors, recipe.beta, fitted.reader), asdict(report)
