"""Through which places refusal reaches the answer: activation patching between refused and jailbroken prompts.

A refused prompt and a jailbroken one are run with the same forced texts, the refusal and the answer that complied. What
one run has at a layer, a component and a group of tokens is put into the other (interchange interventions; Vig et al.
2020, arXiv 2004.12265; Zhang & Nanda 2024, arXiv 2309.16042).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .adapters import unwrapped
from .answers import generate_answers
from .cells import Cells
from .interventions import evaluating
from .pair_runs import GROUPS, PairRuns
from .rates import Mean
from .resume import answers_fingerprint, prompts_fingerprint
from .samples import Sample, batches
from .sites import Site
from .suite import Case
from .trace_results import LAYER, site_name
from .tracing import as_cases, find_sites


@dataclass(frozen=True)
class Effects:
    """Of one place and one group of tokens, a value for each pair, nats; None where a prompt has no such token.

    Attributes:
        indirect: ``Y(jailbroken, patched from the refused run) - Y(jailbroken)``: what refusing takes this way.
        direct: ``Y(refused, patched from the jailbroken run) - Y(jailbroken)``: what takes any other way.
    """

    indirect: list[float | None]
    direct: list[float | None]


@dataclass(frozen=True, eq=False)
class Mediation:
    """Total, direct and indirect effects of being refused rather than jailbroken.

    Y is ``log p(refusal) - log p(complying answer)``, that the answer begins with the forced text, nats.

    Attributes:
        refused: Y of each refused prompt.
        jailbroken: Y of the jailbroken prompt beside it.
        effects: by site and group of tokens; a site of the component "residual" is the stream after the layer.
        settings: plain values.
    """

    refused: list[float]
    jailbroken: list[float]
    effects: Mapping[Site, Mapping[str, Effects]]
    settings: Mapping[str, Any]

    @property
    def total(self) -> Mean:
        """The total effect, ``Y(refused) - Y(jailbroken)``, mean over pairs."""
        return Mean.of([a - b for a, b in zip(self.refused, self.jailbroken, strict=True)])

    def indirect(self, site: Site, group: str) -> Mean:
        """The indirect effect through a place, mean over the pairs that have it."""
        return Mean.of([value for value in self.effects[site][group].indirect if value is not None])

    def direct(self, site: Site, group: str) -> Mean:
        """The direct effect, past that place."""
        return Mean.of([value for value in self.effects[site][group].direct if value is not None])

    def share(self, site: Site, group: str) -> float:
        """The indirect effect over the total one, of the pairs that have the place; NaN where that is 0."""
        pairs = zip(self.effects[site][group].indirect, self.refused, self.jailbroken, strict=True)
        known = [(value, a - b) for value, a, b in pairs if value is not None]
        whole = sum(total for _, total in known)
        return sum(value for value, _ in known) / whole if whole else float("nan")

    def table(self) -> str:
        """A Markdown table: per place and group the indirect effect as a share of the total one, with its interval."""
        lines = [
            f"Total effect {self.total} nats, n = {len(self.refused)} pairs. Indirect effect, nats with 95 % bootstrap "
            "intervals, and its share of the total; direct effect in brackets.",
            "",
            "| place | " + " | ".join(GROUPS) + " |",
            "| --- " * (1 + len(GROUPS)) + "|",
        ]
        for site, by_group in self.effects.items():
            cells = [site_name(site)]
            for group in by_group:
                found = self.indirect(site, group)
                told = f"{found}, {100 * self.share(site, group):.0f} % ({self.direct(site, group).value:.2f})"
                cells.append(told if found.n else "")
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        effects = {str(s): {group: asdict(one) for group, one in by.items()} for s, by in self.effects.items()}
        own = {"refused": self.refused, "jailbroken": self.jailbroken}
        return {**own, "effects": effects, "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Mediation":
        """What `to_dict` gave."""
        effects = {
            Site.parse(site): {group: Effects(**one) for group, one in by.items()}
            for site, by in values["effects"].items()
        }
        return cls(values["refused"], values["jailbroken"], effects, values["settings"])


def pair_prompts(refused: Sequence[Case], jailbroken: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Pairs about the same request, where there are some, for `mediate`; each jailbroken prompt is used at most once.

    A partner with as many images is taken before others, and the categories of attack that come first are not used up
    before the rest. Cases without a request are paired in order.
    """
    waiting: dict[str, list[Case]] = {}
    for case in jailbroken:
        waiting.setdefault(case.request, []).append(case)
    pairs = []
    for case in refused:
        others = waiting.get(case.request)
        if others:
            images = len(Sample(case.messages).images)
            alike = [o for o in others if len(Sample(o.messages).images) == images] or others
            # Not the same place of every list, which would be the same attack.
            chosen = alike[len(pairs) % len(alike)] if case.request else alike[0]
            others.remove(chosen)
            pairs.append((case, chosen))
    return [first for first, _ in pairs], [second for _, second in pairs]


def mediate(
    model: nn.Module,
    processor,
    refused: Sequence[Any],
    jailbroken: Sequence[Any],
    components: Sequence[str] = (LAYER, "ffn", "attention"),
    *,
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    out: str | Path | None = None,
) -> Mediation:
    """Patch activations from a refused run into a jailbroken one, and back.

    Groups of tokens: "image", "prompt" (the rest of the prompt but its last token), "last" (of the prompt), "generated"
    (the forced answer's own). Where two runs have other numbers of tokens of a group they are matched from the end, and
    what has no counterpart gets the group's mean of the other run.

    Args:
        model: any that transformers loads; stays as it is.
        processor: its processor.
        refused: prompts that the model refuses, in any form that `load_samples` takes, or cases.
        jailbroken: for each of them one that it complies with, best about the same request.
        components: of "layer" (the residual stream after it), "ffn" and "attention".
        layers: from 0; if None all, each with the components that it has.
        max_new_tokens: of the model's own answers, which are the forced texts.
        batch_size: pairs per forward; each is in it four times.
        out: a folder that keeps what is finished; another call goes on from there.

    Raises:
        TypeError, ValueError: prompts, components or layers do not fit, or the numbers of prompts differ; before any
            forward. Later: two prompts of a pair are answered alike, or one with nothing.
    """
    model = unwrapped(model)
    sites = list(dict.fromkeys(find_sites(model, components, layers)))
    if not sites:
        raise ValueError(f"layers={layers} names no layer; give numbers from 0, or None for all.")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    pairs = as_cases(refused, "refused"), as_cases(jailbroken, "jailbroken")
    if len(pairs[0]) != len(pairs[1]):
        raise ValueError(f"There are {len(pairs[0])} refused and {len(pairs[1])} jailbroken prompts; give pairs.")
    with evaluating(model):
        return _mediate(model, processor, *pairs, sites, max_new_tokens, batch_size, Cells(out))


@torch.no_grad()
def _mediate(model, processor, refused, jailbroken, sites, max_new_tokens, batch_size, cells) -> Mediation:
    base = {"model": answers_fingerprint(model, processor), "prompts": prompts_fingerprint([*refused, *jailbroken])}
    base |= {"tokens": max_new_tokens, "batch": batch_size}
    answers = [
        cells.get(
            {**base, "answers of": name},
            lambda cases=cases: generate_answers(model, processor, cases, max_new_tokens, batch_size),
        )
        for name, cases in (("refused", refused), ("jailbroken", jailbroken))
    ]
    _check_answers(*answers)
    found: dict[str, list[float]] = {"refused": [], "jailbroken": []}
    effects = {site: {group: Effects([], []) for group in GROUPS} for site in sites}
    parts = list(batches(range(len(refused)), batch_size))
    with logging.tqdm(total=len(parts) * len(sites), desc="Patching", unit="place") as progress:
        for part in parts:
            mine = [[items[i] for i in part] for items in (refused, jailbroken, *answers)]
            runs = PairRuns(model, processor, *mine, sites)
            for site in [None, *sites]:
                asked = {**base, "part": list(part), "site": str(site)}
                values = cells.get(asked, lambda runs=runs, site=site: runs.patched(site))
                for group, by in values.items():
                    for name, items in by.items():
                        (found[name] if site is None else getattr(effects[site][group], name)).extend(items)
                progress.update(site is not None)
    settings = {"max_new_tokens": max_new_tokens, "pairs": len(refused)}
    return Mediation(found["refused"], found["jailbroken"], effects, settings)


def _check_answers(refusals: Sequence[str], complied: Sequence[str]) -> None:
    for index, (refusal, answer) in enumerate(zip(refusals, complied, strict=True)):
        if not refusal or not answer or refusal == answer:
            raise ValueError(
                f"Pair {index}: the model answers {refusal!r} to the refused prompt and {answer!r} to the jailbroken "
                "one; give a prompt that it refuses and one that it complies with."
            )
