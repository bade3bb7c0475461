"""Which hidden units of the feed-forward networks carry refusal: estimated for all at once, measured for some.

A unit is one input of an FFN's `down_proj`. Its effect is what the log-odds of refusal lose or win, in nats, when its
value is replaced by a reference at every token of the prompt. Attribution patching (Nanda 2023; Syed, Rager and Conmy,
arXiv 2310.10348) estimates the effects of all units to first order from one forward and one backward pass, which says
nothing of units that saturate or act together; so the largest estimates, and as many others, are measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from .adapters import unwrapped
from .attacks import frozen
from .contrasts import Contrast
from .neuron_runs import Unit, UnitRuns, down_projection
from .rates import Mean
from .samples import load_samples
from .sites import decoder_layers

__all__ = ["NeuronRanking", "VerifiedNeuron", "down_projection", "rank_neurons"]

REFERENCES = ("mean", "zero")


@dataclass(frozen=True)
class VerifiedNeuron:
    """A unit that was really ablated.

    Attributes:
        layer, unit: which, both from 0.
        estimate: its effect to first order, nats.
        effect: the log-odds of refusal with it ablated less those of the model as it is, mean over prompts, nats. Below
            0 the unit made the model refuse.
        low, high: 95 % percentile bootstrap interval of `effect` over prompts; None if there was one prompt.
        chosen: "top" for its estimate, or "random", drawn from all others.
    """

    layer: int
    unit: int
    estimate: float
    effect: float
    low: float | None
    high: float | None
    chosen: str


@dataclass(frozen=True, eq=False)
class NeuronRanking:
    """The effects of FFN units on refusal.

    Attributes:
        estimates: by layer, float32 (units,), effects to first order, nats.
        verified: the units whose effects were measured, the top ones first, by falling absolute estimate.
        correlation: Spearman's between estimate and effect over the "top" ones, the "random" ones and "both"; None
            where it is undefined, with fewer than two units or equal values.
        outcome: the log-odds of refusal of the model as it is, mean over prompts, nats.
        settings: how they were found, plain JSON.
    """

    estimates: dict[int, torch.Tensor]
    verified: list[VerifiedNeuron]
    correlation: dict[str, float | None]
    outcome: float
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything but `estimates`, as plain JSON."""
        return {
            "verified": [asdict(neuron) for neuron in self.verified],
            "correlation": dict(self.correlation),
            "outcome": self.outcome,
            "settings": dict(self.settings),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """`estimates` by names such as "neurons.3.estimate", as safetensors take them."""
        return {f"neurons.{layer}.estimate": values.contiguous() for layer, values in self.estimates.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "NeuronRanking":
        """Put together again what `to_dict` and `tensors` gave; other tensors are let be.

        Raises:
            ValueError: the estimates of a layer are missing.
        """
        names = {layer: f"neurons.{layer}.estimate" for layer in data["settings"]["layers"]}
        missing = sorted(set(names.values()) - set(tensors))
        if missing:
            raise ValueError(f"The tensors {missing} are missing; give those that `tensors()` gave with this ranking.")
        return cls(
            estimates={layer: tensors[name] for layer, name in names.items()},
            verified=[VerifiedNeuron(**neuron) for neuron in data["verified"]],
            correlation=dict(data["correlation"]),
            outcome=data["outcome"],
            settings=dict(data["settings"]),
        )

    def table(self) -> str:
        """The measured units as a Markdown table, largest absolute effect first, nats."""
        rows = [
            "| Layer | Unit | Chosen | Estimate | Effect | 95 % interval |",
            "| --: | --: | --- | --: | --: | --- |",
        ]
        for n in sorted(self.verified, key=lambda n: -abs(n.effect)):
            interval = "-" if n.low is None else f"[{n.low:+.4f}, {n.high:+.4f}]"
            rows.append(f"| {n.layer} | {n.unit} | {n.chosen} | {n.estimate:+.4f} | {n.effect:+.4f} | {interval} |")
        return "\n".join(rows)


def rank_neurons(
    model: nn.Module,
    processor,
    malicious,
    benign,
    contrast: Contrast,
    *,
    reference: str = "mean",
    layers: Sequence[int] | None = None,
    top: int = 20,
    batch_size: int = 16,
    seed: int = 0,
) -> NeuronRanking:
    """Rank FFN units by their effect on refusal: ablated, a unit holds `reference` at every token of the prompt.

    The estimate is ``sum_t (r - a_t) dY/da_t``, `r` the reference, `a_t` the unit at prompt token t, `Y` the log-odds
    of refusal after the last one. In bfloat16 a logit of 20 is rounded to about 0.1 nats, which hides the effects of
    most single units; use float32 to read measured effects.

    Args:
        model: repaired or not, given back as it was; run in evaluation mode.
        processor: its processor, with a chat template.
        malicious: the prompts whose outcome is followed: anything with chat `messages`, or what `load_samples` takes.
        benign: the prompts of the mean; may be None with "zero".
        contrast: the tokens of refusal and compliance.
        reference: "mean" of the unit over all tokens of the benign prompts, or "zero".
        layers: which decoder layers; all unless told.
        top: how many units are measured, and as many random others if there are; each costs a forward of all prompts.
        batch_size: rows of one forward; memory only.
        seed: of the random units and of the bootstrap.

    Raises:
        ValueError: a setting out of range, a layer without a single down projection or that the prompts do not run, a
            token that the model does not have, or an outcome that is not finite.
    """
    model = unwrapped(model)
    layers = sorted(range(len(decoder_layers(model))) if layers is None else map(int, layers))
    _check(model, layers, benign, contrast, reference, top, batch_size)
    prompts = load_samples(malicious, "malicious")
    others = load_samples(benign, "benign") if reference == "mean" else ()
    run = UnitRuns(model, processor, layers, batch_size)
    with frozen(model):
        references = run.means(others) if others else dict.fromkeys(layers, torch.zeros(()))
        estimates, outcome = run.estimates(prompts, contrast, references)
        chosen = _choose(estimates, top, seed)
        effects = run.effects(prompts, contrast, references, [*chosen])
    verified = [
        VerifiedNeuron(*unit, float(estimates[unit[0]][unit[1]]), float(effect.mean()), *_interval(effect, seed), why)
        for (unit, why), effect in zip(chosen.items(), effects, strict=True)
    ]
    settings = {
        "model": type(model).__name__,
        "reference": reference,
        "layers": layers,
        "top": top,
        "batch_size": batch_size,
        "seed": seed,
        "malicious": len(prompts),
        "benign": len(others),
        "contrast": {"refused": list(contrast.refused), "complied": list(contrast.complied)},
    }
    return NeuronRanking(estimates, verified, _correlations(verified), outcome, settings)


def _check(model, layers, benign, contrast, reference, top, batch_size) -> None:
    if reference not in REFERENCES:
        raise ValueError(f"reference={reference!r} is not known; choose one of {REFERENCES}.")
    if reference == "mean" and benign is None:
        raise ValueError("benign=None, but the reference 'mean' is that of benign prompts; give some, or use 'zero'.")
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers={layers} must name decoder layers, each once.")
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    units = sum(down_projection(model, layer).in_features for layer in layers)
    if top > units:
        raise ValueError(f"top={top}, but the layers {layers} have {units} units; choose fewer.")
    known = model.config.get_text_config().vocab_size
    if not all(0 <= token < known for token in (*contrast.refused, *contrast.complied)):
        raise ValueError(f"{contrast} names tokens that {type(model).__name__}, with {known}, does not have.")


def _choose(estimates: Mapping[int, torch.Tensor], top: int, seed: int) -> dict[Unit, str]:
    """The top units, and as many others if there are, and why."""
    units = [(layer, unit) for layer, values in estimates.items() for unit in range(len(values))]
    order = torch.cat([*estimates.values()]).abs().argsort(descending=True, stable=True).tolist()
    others = order[top:]
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:top].tolist()
    return {
        **{units[i]: "top" for i in order[:top]},
        **{units[others[j]]: "random" for j in sorted(drawn)},
    }


def _interval(effects: torch.Tensor, seed: int) -> tuple[float, float] | tuple[None, None]:
    """95 % bootstrap interval of the mean over prompts, (n,); none of one prompt."""
    found = Mean.of(effects.tolist(), seed)
    return (found.low, found.high) if found.n > 1 else (None, None)


def _correlations(verified: Sequence[VerifiedNeuron]) -> dict[str, float | None]:
    found = {}
    for name in ("top", "random", "both"):
        pairs = [(n.estimate, n.effect) for n in verified if name in (n.chosen, "both")]
        # Ranks need two units at least, and different values.
        defined = pairs and all(len(set(values)) > 1 for values in zip(*pairs, strict=True))
        found[name] = float(spearmanr(*zip(*pairs, strict=True)).statistic) if defined else None
    return found
