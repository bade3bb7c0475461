"""What it costs to switch from a repair that cannot be merged to one that can, measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .merge_check import TOKENS, Inputs, as_list, probe_inputs, token_logits
from .mergeability import PRINTED, Obstacle, plan_merge
from .merged_model import plain_copy
from .modeling_care import CareForConditionalGeneration
from .subspace import SafetySubspaces

NO_REPAIR = "no repair"
# Measured by benchmarks/merge_cost.py; on the second checkpoint it is 43 % and 89 %.
ON_THE_TESTBED = "on the bundled testbed it refuses 31 % of attacks where the gated one refuses 86 %"


@dataclass(frozen=True)
class Cost:
    """How far another setting is from the repair as it is.

    Attributes:
        divergence: of the distribution of the next token, Kullback-Leibler from the repair as it is, nats per token.
        agreement: the share of tokens after which both find the same token the most probable.
        tokens: how many were compared.
    """

    divergence: float
    agreement: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.divergence:.2g} nats per token, {self.agreement:.0%} of next tokens the same"


def alternatives(repaired: CareForConditionalGeneration) -> dict[str, SafetySubspaces]:
    """The same subspaces under settings that can be merged, by these settings, in the form of a `Recipe`'s arguments.

    Empty where a merge takes another site, or a repair without a gate, which have to be fitted anew.
    """
    subspaces = SafetySubspaces.from_model(repaired)
    decides = subspaces.gate is not None and subspaces.gate.readers.shape[1]
    if decides or not all(set(by) <= {"visual", "text"} for by in subspaces.sites.values()):
        return {}
    words = []
    if subspaces.scope != "all":
        subspaces, words = replace(subspaces, scope="all", gate=None, gate_site=None), ["scope='all'"]
    base, found = plain_copy(repaired.vlm), {}
    for setting, changed in _fusions(subspaces).items():
        for anchor, other in (("", changed), ("anchor='none'", _unanchored(changed))):
            name = ", ".join(part for part in (*words, setting, anchor) if part)
            if name and not plan_merge(CareForConditionalGeneration.from_base(base, other))[1]:
                found[name] = other
                break  # the anchor stays if it can
    return found


def _unanchored(subspaces: SafetySubspaces) -> SafetySubspaces:
    sites = {site: {name: replace(s, beta=0.0) for name, s in by.items()} for site, by in subspaces.sites.items()}
    return replace(subspaces, sites=sites)


def _fusions(subspaces: SafetySubspaces) -> dict[str, SafetySubspaces]:
    if not any(len(by_modality) == 2 for by_modality in subspaces.sites.values()):
        return (
            {"fusion='constant'": replace(subspaces, fusion="constant")}
            if subspaces.fusion == "route"
            else {"": subspaces}
        )
    found = {
        "fusion='constant', fusion_weight=0.5": replace(subspaces, fusion="constant", fusion_weight=0.5),
        "fusion='union'": replace(subspaces, fusion="union"),
    }
    if subspaces.fusion in ("constant", "union"):
        found = {"": subspaces, **found}
    for modality in ("visual", "text"):
        if all(modality in by_modality for by_modality in subspaces.sites.values()):
            only = replace(subspaces.only(modality), fusion="constant")
            found[f"fusion='constant', modalities=('{modality}',)"] = only
    return found


@torch.no_grad()
def cost_of_switching(
    repaired: CareForConditionalGeneration, inputs: Inputs | Sequence[Inputs] | None = None
) -> dict[str, Cost]:
    """Measure how far the same subspaces under settings that can be merged are from a repair that cannot.

    Args:
        repaired: the repair as it is.
        inputs: what to measure on: arguments of the model's forward, or a list of them. By default questions beside
            noise if the model has a processor, otherwise random tokens; give prompts of your own for a figure to go by.

    Returns:
        The costs by setting, in the form of a `Recipe`'s arguments, the least first; then that of no repair at all.
    """
    inputs = as_list(probe_inputs(repaired) if inputs is None else inputs)
    training, base = repaired.training, plain_copy(repaired.vlm).eval()
    try:
        with repaired.enable():
            reference = token_logits(repaired.eval(), inputs)
    finally:
        repaired.train(training)
    costs = {
        setting: compare(reference, token_logits(CareForConditionalGeneration.from_base(base, other), inputs))
        for setting, other in alternatives(repaired).items()
    }
    ordered = dict(sorted(costs.items(), key=lambda item: item[1].divergence))
    return ordered | {NO_REPAIR: compare(reference, token_logits(base, inputs))}


def compare(reference: torch.Tensor, other: torch.Tensor) -> Cost:
    """How far logits (n, vocabulary) are from those of a reference."""
    divergence, same = 0.0, 0
    for mine, theirs in zip(reference.split(TOKENS), other.split(TOKENS), strict=True):
        expected, found = (logits.double().log_softmax(dim=-1) for logits in (mine, theirs))
        divergence += torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True).item()
        same += int((expected.argmax(dim=-1) == found.argmax(dim=-1)).sum())
    return Cost(max(0.0, divergence / len(reference)), same / len(reference), len(reference))


def refusal(repaired: CareForConditionalGeneration, obstacles: Sequence[Obstacle], inputs: Sequence[Inputs]) -> str:
    """The error of a merge that cannot be: why, which setting could, and what switching to it costs."""
    by_reason: dict[str, list[str]] = {}
    for obstacle in obstacles:
        by_reason.setdefault(obstacle.reason, []).extend([str(obstacle.site)] if obstacle.site else [])
    reasons = [f"{reason} ({', '.join(sites)})" if sites else reason for reason, sites in by_reason.items()]
    message = f"The repair cannot be merged into weights: {'; '.join(reasons)}."
    settings = list(dict.fromkeys(obstacle.setting for obstacle in obstacles))
    if "" in settings:
        return f"{message} Nothing that a layer of this family adds comes from a linear layer; keep the repaired model."
    try:
        costs = cost_of_switching(repaired, inputs)
    except ValueError as error:
        return f"{message} What would merge is {' and '.join(settings)}. What that costs was not measured: {error}"
    without = costs.pop(NO_REPAIR)
    if not costs:
        gated = f" ({ON_THE_TESTBED})" if PRINTED in settings else ""
        return (
            f"{message} What would merge is {' and '.join(settings)}, fitted anew{gated}. Of this model only the way "
            f"to no repair at all can be measured: {without} ({without.tokens} tokens)."
        )
    setting, cost = next(iter(costs.items()))
    return (
        f"{message} What would merge is Recipe({setting}), at a cost of {cost}; no repair at all: {without} "
        f"({cost.tokens} tokens). `care_hf.cost_of_switching(model, inputs)` measures it on your prompts, and other "
        "settings."
    )
