"""Measure defences side by side: attacks, side effects, and who gets past them by gradient."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from .adapters import unwrapped
from .budget import Budget
from .cells import Cells
from .defences import Defence
from .evaluation_run import Run, switched
from .fitting import load_processor
from .judges import Judge, KeywordJudge
from .report import Report, environment
from .samples import Sample
from .suite import Suite


def evaluate(
    model: nn.Module,
    suite: Suite,
    defences: Mapping[str, Defence | Callable[[], Defence]] | None = None,
    judge: Judge | Sequence[Judge] | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    *,
    processor=None,
    adaptive: Sequence[str] = (),
    out: str | Path | None = None,
) -> Report:
    """Measure a model under a suite, undefended and under every defence, and report it.

    Args:
        model: the undefended model; stays as it is. A repaired model (`care_hf.fit`'s) may be given in its place: it
            is measured with its repair off and on.
        suite: what is asked.
        defences: by name; a function is called when its first unfinished cell is due, so that what is finished is not
            trained again. Its attribute `settings`, if it has one, goes into the report, and tells its cells apart;
            so must those of hooks and functions, that have no `digest` to do so.
        judge: one or several; tables show the first. By default keywords.
        budget: how much is measured.
        seed: of gradient attacks.
        processor: the model's; by default loaded from where the model came from.
        adaptive: the defences that gradient attacks go through; those on the undefended model are tried on all.
        out: a folder that keeps every finished cell; a run that finds it goes on from there.

    Raises:
        ValueError: a defence has a name that is taken, `adaptive` names none, two judges share a name, or a pictured
            case has not one image and a target; before anything is run.
    """
    model = unwrapped(model)
    own = switched(model)
    everything: dict[str, Any] = {**own, **(defences or {})}
    judges = list(judge) if isinstance(judge, (list, tuple)) else [judge or KeywordJudge()]
    _check(suite, defences or {}, own, adaptive, judges)
    run = Run(model, processor or load_processor(model), suite, judges, budget or Budget(), seed, Cells(out))
    with logging.tqdm(total=len(everything), desc="Evaluating", unit="defence") as progress:
        for name, defence in everything.items():
            progress.set_postfix_str(name)
            run.measure(name, defence, name in own or name in adaptive)
            progress.update()
    settings = {"suite": suite.name, "source": dict(suite.source), "budget": asdict(run.budget), "seed": seed}
    settings |= {"judges": {j.name: j.settings for j in judges}, "defences": run.settings}
    return Report(run.results, {**settings, "environment": environment()})


def _check(suite: Suite, given: Mapping, own: Mapping, adaptive: Sequence[str], judges: Sequence[Judge]) -> None:
    if set(given) & set(own):
        raise ValueError(f"The names {sorted(set(given) & set(own))} are taken; give those defences others.")
    unknown = sorted(set(adaptive) - set(given))
    if unknown:
        raise ValueError(f"adaptive={unknown} names no defence; known are {sorted(given)}.")
    if not judges:
        raise ValueError("`judge` is an empty list; give at least one judge, or None for keywords.")
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise ValueError(f"Judges {names} share a name; give each its own.")
    if not suite.sets:
        raise ValueError(f"Suite {suite.name!r} has no cases; give it attacks, harmful or benign ones.")
    for family, cases in suite.pictured.items():
        for index, case in enumerate(cases):
            if not case.target or len(Sample(case.messages).images) != 1:
                raise ValueError(
                    f"pictured[{family!r}][{index}] needs exactly one image and a target for gradient attacks."
                )
