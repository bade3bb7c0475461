"""Diagnose a model: block, patch, rank, separate, attribute, and keep what was found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import unwrapped
from .cells import Cells
from .contrasts import Contrast
from .diagnosis import Diagnosis, describe, versions
from .fitting import load_processor
from .judges import Judge
from .mediation import mediate, pair_prompts
from .neurons import NeuronRanking, down_projection, rank_neurons
from .resume import answers_fingerprint, prompts_fingerprint
from .samples import Sample
from .separability import Separability, measure_separability
from .separation import given_groups, plan_labellings
from .sites import Site
from .suite import Case
from .token_attribution import TokenAttribution, attribute
from .trace_results import LAYER, Trace
from .tracing import as_cases, find_sites, trace

MIN_PAIRS, FOLDS = 4, 5
CLASSES = ("malicious", "benign")


def diagnose(
    model: nn.Module,
    malicious: Sequence[Any],
    benign: Sequence[Any],
    processor=None,
    judge: Judge | None = None,
    *,
    components: Sequence[str] = (LAYER, "ffn", "attention"),
    layers: Sequence[int] | None = None,
    modes: Sequence[str] = ("mean",),
    max_pairs: int = 32,
    top_neurons: int = 20,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    out: str | Path | None = None,
) -> Diagnosis:
    """Find which layers, components, FFN units and tokens carry what the model does with malicious prompts.

    What cannot be measured (no prompt that it refuses beside one that it complies with about the same request; experts
    instead of an FFN; an answer that is empty) is left out, and the artefact says why.

    Args:
        model: any that transformers loads; stays as it is.
        malicious: prompts that should be refused: plain ones that are, and jailbreaks; see `tracing.trace`.
        benign: prompts that should be answered.
        processor: the model's; by default loaded from where the model came from.
        judge: of the answers; by default keywords.
        components: of "layer", "ffn" and "attention".
        layers: from 0; if None all, each with the components that it has.
        modes: of blocking, see `tracing.trace`.
        max_pairs: of a refused and a jailbroken prompt, for patching.
        top_neurons: FFN units that are really ablated, and as many at random.
        max_new_tokens: of every answer.
        batch_size: prompts per forward.
        seed: of whatever is drawn.
        out: a folder that keeps what is finished; another call goes on from there.

    Raises:
        TypeError, ValueError: prompts, judge and model do not fit together, mostly before any forward; or the model
            refuses none or all of the malicious prompts.
        ImportError: scikit-learn is not installed.
    """
    model = unwrapped(model)
    counts = {"max_pairs": max_pairs, "top_neurons": top_neurons, "max_new_tokens": max_new_tokens}
    _check_counts({**counts, "batch_size": batch_size}, seed)
    processor = processor or load_processor(model)
    cases = as_cases(malicious, "malicious"), as_cases(benign, "benign")
    _check_disjoint(*cases)
    sites = find_sites(model, components, layers)
    groups = {name: _groups(items, name) for name, items in zip(CLASSES, cases, strict=True)}
    # Two prompts of each class in every fold, and no request in two.
    folds = min(FOLDS, *(min(len(set(found)), len(found) // 2) for found in groups.values()))
    left_out = {"neurons": _no_units(model, sites, top_neurons), "separability": _no_folds(groups, folds, seed)}
    kept = Path(out) / "cells" if out else None
    options = {"components": components, "layers": layers, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    traced = trace(model, processor, *cases, judge, modes=modes, seed=seed, out=kept, **options)
    refused, complied = (_answered(cases[0], traced, verdict) for verdict in ("refused", "complied"))
    pairs = [items[:max_pairs] for items in pair_prompts(refused, complied)]
    left_out = {"mediation": _too_few_pairs(len(pairs[0])), **left_out}
    measuring = _Measuring(model, processor, cases, sites, batch_size, seed, Cells(kept))
    made = {
        "mediation": lambda: mediate(model, processor, *pairs, out=kept, **options),
        "neurons": lambda: measuring.neurons(traced.settings["contrast"], top_neurons),
        "separability": lambda: measuring.separability(groups, folds),
    }
    parts = {name: _unless(left_out, name, make) for name, make in made.items()}
    attributions = {}
    for name, items in (("refused", refused), ("jailbroken", complied)):
        if items:
            told = f"attribution of a {name} prompt"
            attributions[name] = _unless(left_out, told, partial(measuring.attribution, items[0], max_new_tokens))
    settings = {name: len(items) for name, items in zip(CLASSES, cases, strict=True)}
    settings |= {"pairs": len(pairs[0]), "max_new_tokens": max_new_tokens, "seed": seed, **versions()}
    return Diagnosis(
        describe(model),
        traced,
        **parts,
        attributions={name: one for name, one in attributions.items() if one},
        left_out={name: reason for name, reason in left_out.items() if reason},
        settings=settings,
    )


class _Measuring:
    """What is measured on all prompts at once, each kept in a cell."""

    def __init__(self, model, processor, cases, sites: Sequence[Site], batch_size: int, seed: int, cells: Cells):
        self.model, self.processor, self.cases, self.sites = model, processor, cases, sites
        self.batch_size, self.seed, self._kept = batch_size, seed, cells
        prompts = [prompts_fingerprint(items) for items in cases]
        told = answers_fingerprint(model, processor)
        self._key = {"model": told, "prompts": prompts, "batch": batch_size, "seed": seed}

    def neurons(self, contrast: Mapping[str, Sequence[int]], top: int) -> NeuronRanking:
        """The effects of FFN units on the log-odds of refusal."""
        told = Contrast(**{name: tuple(ids) for name, ids in contrast.items()})
        options = {"layers": sorted({site.layer for site in self.sites}), "top": top}

        def rank() -> dict[str, Any]:
            found = rank_neurons(*self._prompts, told, batch_size=self.batch_size, seed=self.seed, **options)
            tensors = {name: tensor.tolist() for name, tensor in found.tensors().items()}
            return {"values": found.to_dict(), "tensors": tensors}

        found = self._kept.get({**self._key, "of": "neurons", "contrast": asdict(told), **options}, rank)
        return NeuronRanking.from_dict(found["values"], {n: torch.tensor(v) for n, v in found["tensors"].items()})

    def separability(self, groups: Mapping[str, Sequence[str]], folds: int) -> Separability:
        """How far the classes lie apart."""
        options = {"groups": groups, "folds": folds}

        def measure() -> dict[str, Any]:
            rest = {"sites": self.sites, "batch_size": self.batch_size, "seed": self.seed}
            return measure_separability(*self._prompts, **rest, **options).to_dict()

        sites = [str(site) for site in self.sites]
        return Separability.from_dict(
            self._kept.get({**self._key, "of": "separability", "sites": sites, **options}, measure)
        )

    def attribution(self, case: Case, max_new_tokens: int) -> TokenAttribution:
        """What the answer to one prompt hangs on."""
        options = {"max_new_tokens": max_new_tokens, "batch_size": self.batch_size}
        return attribute(self.model, self.processor, case, **options)

    @property
    def _prompts(self) -> tuple:
        return self.model, self.processor, *self.cases


def _answered(cases: Sequence[Case], traced: Trace, verdict: str) -> list[Case]:
    return [case for case, said in zip(cases, traced.unblocked.malicious, strict=True) if said == verdict]


def _too_few_pairs(count: int) -> str:
    if count >= MIN_PAIRS:
        return ""
    return f"{count} pairs of a refused and a jailbroken prompt with the same request; {MIN_PAIRS} are needed."


def _no_units(model: nn.Module, sites: Sequence[Site], top: int) -> str:
    """Why FFN units cannot be ranked; empty if they can."""
    layers = sorted({site.layer for site in sites})
    try:
        units = sum(down_projection(model, layer).in_features for layer in layers)
    except ValueError as error:
        return str(error)
    if top > units:
        raise ValueError(f"top_neurons={top}, but the layers {layers} have {units} units; choose fewer.")
    return ""


def _no_folds(groups: Mapping[str, Sequence[str]], folds: int, seed: int) -> str:
    """Why the classes cannot be told apart on held-out prompts; empty if they can."""
    if folds < 2:
        counts = {name: f"{len(own)} prompts of {len(set(own))} requests" for name, own in groups.items()}
        return f"{counts}; each class needs 4 prompts of 2 requests."
    try:
        plan_labellings(given_groups(groups, [len(groups[name]) for name in reversed(CLASSES)]), folds, 1, 0.0, seed)
    except ValueError as error:
        return str(error)
    return ""


def _unless(left_out: dict[str, str], name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives; None if there is a reason against it, or one turns up, which costs nothing else."""
    if left_out.get(name):
        return None
    try:
        return make()
    except (ValueError, FloatingPointError) as error:
        left_out[name] = str(error)
        return None


def _groups(cases: Sequence[Case], name: str) -> list[str]:
    """What is held out together: prompts of one request; those without one are alone."""
    return [case.request or f"{name} prompt {index}" for index, case in enumerate(cases)]


def _check_counts(counts: Mapping[str, Any], seed: Any) -> None:
    for name, value, least in (*((name, value, 1) for name, value in counts.items()), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")


def _check_disjoint(malicious: Sequence[Case], benign: Sequence[Case]) -> None:
    known = {Sample(case.messages).digest for case in benign}
    both = [index for index, case in enumerate(malicious) if Sample(case.messages).digest in known]
    if both:
        raise ValueError(f"The malicious prompts {both} are benign ones, too; leave them out of one of the sets.")
