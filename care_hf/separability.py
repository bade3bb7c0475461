"""How far benign and malicious activations lie apart, at every layer and component of a decoder.

The measures are those by which CARE (arXiv 2603.27240, step 1) chooses its layers, and a probe; see `separation`.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .adapters import unwrapped
from .interventions import evaluating
from .reading import read
from .samples import Samples, batches, collate, load_samples
from .separation import CLASSES, MEASURES, SiteSeparability, given_groups, group_ids, plan_labellings, separate_planned
from .sites import Site, decoder_layers, site_module

TOKENS = ("last", "mean")
ORDER = ("attention", "ffn", "residual")  # in which a layer runs


@dataclass(frozen=True)
class Separability:
    """How far the two classes lie apart at every site, in the order in which sites run unless they were named.

    Attributes:
        sites: what was measured.
        skipped: why sites, written "3.ffn", were left out: the layer has no such component.
        settings: what it was measured with, and the numbers of prompts and of groups; plain values.
    """

    sites: Mapping[Site, SiteSeparability]
    skipped: Mapping[str, str]
    settings: Mapping[str, Any]

    def best(self, measure: str = "auc") -> Site:
        """The site with the largest value of one of `MEASURES`, of equals the first.

        Raises:
            ValueError: an unknown measure.
        """
        if measure not in MEASURES:
            raise ValueError(f"measure={measure!r} is not known; choose one of {MEASURES}.")
        return max(self.sites, key=lambda site: getattr(self.sites[site], measure))

    def table(self) -> str:
        """A Markdown table with a row per site; in brackets mean and 95 % quantile over random labels."""
        rows = ["| site | silhouette | scatter ratio | Mahalanobis | AUC |", "| --- " + "| ---: " * 4 + "|"]
        for site, found in self.sites.items():
            cells = [
                f"{getattr(found, name):.3f} ({found.control[name][0]:.3f}, {found.control[name][1]:.3f})"
                for name in MEASURES
            ]
            rows.append(f"| {' | '.join([str(site), *cells])} |")
        return "\n".join(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that strict JSON can hold: an infinite number is written "inf"."""

        def plain(value: float) -> float | str:
            return value if math.isfinite(value) else str(value)

        sites = {}
        for site, found in self.sites.items():
            values = asdict(found)
            control = {name: [plain(v) for v in pair] for name, pair in values.pop("control").items()}
            sites[str(site)] = {name: plain(value) for name, value in values.items()} | {"control": control}
        return {"sites": sites, "skipped": dict(self.skipped), "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Separability":
        """Read what `to_dict` gave.

        Raises:
            KeyError: something is missing.
            ValueError: a site or a number is of another form.
        """
        sites = {}
        for site, found in values["sites"].items():
            control = {name: tuple(map(float, found["control"][name])) for name in MEASURES}
            sites[Site.parse(site)] = SiteSeparability(*(float(found[name]) for name in MEASURES), control)
        return cls(sites, dict(values["skipped"]), dict(values["settings"]))


# All sites of a model


def measure_separability(
    model: nn.Module,
    processor,
    malicious: Iterable[Any],
    benign: Iterable[Any],
    *,
    sites: Sequence[Site] | None = None,
    tokens: str = "last",
    groups: Mapping[str, Sequence[Hashable]] | None = None,
    batch_size: int = 16,
    folds: int = 5,
    permutations: int = 20,
    shrinkage: str | float = "ledoit-wolf",
    seed: int = 0,
) -> Separability:
    """Measure how far benign and malicious activations lie apart, by the measures of `separate`, at every site.

    All sites are read in one pass over the prompts, and kept as float32: prompts x sites x d numbers. On the model's
    device all tokens of one batch are held at all sites at once; where that is too much, lower `batch_size`.

    Args:
        model: a vision-language model.
        processor: its processor, with a chat template.
        malicious: prompts as `samples.load_samples` takes them, or objects with chat `messages`.
        benign: likewise; best of the same kinds, for else the kind is what tells the classes apart.
        sites: where to measure; None: all layers and components that the model has.
        tokens: "last", the activation of the last prompt token, or "mean", the mean over all prompt tokens.
        groups: one label per prompt under "benign" and "malicious"; prompts that share one are held out together. None:
            the samples' own groups; equal prompts are of one group, too.
        batch_size: prompts per forward.
        folds: of the cross-validation.
        permutations: random labellings of the control.
        shrinkage: "ledoit-wolf" or a number in [0, 1].
        seed: of the folds and of the random labels.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: as `separate`; the model has not the site that was named; a prompt is in both classes.
        TypeError, OSError: as `load_samples`.
        FloatingPointError: an activation is not finite.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens={tokens!r} is not known; choose one of {TOKENS}.")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1.")
    model = unwrapped(model)
    chosen, skipped = _sites(model, sites)
    samples = {"benign": load_samples(benign, "benign"), "malicious": load_samples(malicious, "malicious")}
    both = set(samples["benign"].digests) & set(samples["malicious"].digests)
    if both:
        raise ValueError(f"{len(both)} prompts are both malicious and benign; leave them out of one of the sets.")
    counts = [len(samples[name]) for name in CLASSES]
    ids = _own_groups(samples) if groups is None else given_groups(groups, counts)
    plan = plan_labellings(ids, folds, permutations, shrinkage, seed)
    activations = read_activations(model, processor, samples, chosen, tokens, batch_size)
    found = {}
    for site in logging.tqdm(chosen, desc="Measuring separability", unit="site", leave=False):
        found[site] = separate_planned(activations.pop(site), plan, shrinkage)
    settings = {"tokens": tokens, "folds": folds, "permutations": permutations, "shrinkage": shrinkage, "seed": seed}
    numbers = {"prompts": dict(zip(CLASSES, counts, strict=True)), "groups": len({i for own in ids for i in own})}
    return Separability(found, skipped, settings | numbers)


def _sites(model: nn.Module, sites: Sequence[Site] | None) -> tuple[list[Site], dict[str, str]]:
    """The sites to read, and why others are left out."""
    if sites is not None:
        for site in sites:
            site_module(model, site)
        if not sites:
            raise ValueError("`sites` is empty; name one at least, or pass None for all.")
        return list(dict.fromkeys(sites)), {}
    chosen, skipped = [], {}
    for site in (Site(layer, component) for layer in range(len(decoder_layers(model))) for component in ORDER):
        try:
            site_module(model, site)
            chosen.append(site)
        except ValueError as error:
            skipped[str(site)] = str(error)
    return chosen, skipped


def _own_groups(samples: Mapping[str, Samples]) -> list[list[int]]:
    labels = [
        [digest, *enumerate(own)]
        for name in CLASSES
        for digest, own in zip(samples[name].digests, samples[name].groups, strict=True)
    ]
    ids, benign = group_ids(labels), len(samples["benign"])
    return [ids[:benign], ids[benign:]]


@torch.no_grad()
def read_activations(
    model: nn.Module, processor, samples: Mapping[str, Samples], sites: Sequence[Site], tokens: str, batch_size: int
) -> dict[Site, torch.Tensor]:
    """Read all sites in one pass over the prompts; the model comes back in the mode that it was in.

    Args:
        model: a vision-language model.
        processor: its processor, with a chat template.
        samples: prompts under "benign" and "malicious".
        sites: where to read.
        tokens: one of `TOKENS`, see `measure_separability`.
        batch_size: prompts per forward.

    Returns:
        Per site the activations of benign and then of malicious prompts, float32 (n, d), on the CPU.

    Raises:
        ValueError: the model has no such site.
        FloatingPointError: an activation is not finite.
    """
    take: Callable = _last if tokens == "last" else _mean
    rows: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
    work = [(name, part) for name in CLASSES for part in batches(range(len(samples[name])), batch_size)]
    with evaluating(model):
        for name, part in logging.tqdm(work, desc="Reading activations", unit="batch", leave=False):
            # Right padding: no prompt token sees it under causal attention, and positions count from 0.
            inputs = collate(processor, [samples[name][i] for i in part], (), padding_side="right").inputs
            activations = read(model, sites, inputs)
            for site in sites:
                h = take(activations[site], inputs["attention_mask"].to(activations[site].device).bool()).cpu()
                if not torch.isfinite(h).all():
                    raise FloatingPointError(
                        f"Activations at site {site} are not finite on a {name} prompt; check the model's weights, or "
                        "load it in bfloat16 or float32 if it is in float16."
                    )
                rows[site].append(h)
    return {site: torch.cat(parts) for site, parts in rows.items()}


def _last(h: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The last real token of right-padded rows (B, S, d), float32 (B, d)."""
    return h[torch.arange(len(h), device=h.device), real.sum(dim=1) - 1].float()


def _mean(h: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The mean over the real tokens of rows (B, S, d), float32 (B, d)."""
    return h.float().masked_fill(~real[..., None], 0).sum(dim=1) / real.sum(dim=1, keepdim=True)
