"""Search for a recipe on validation prompts: few attacks that succeed, and little change of benign answers."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .adapters import unwrapped
from .fitting import load_processor
from .judges import Judge, WordJudge, is_refusal
from .modeling_care import CareForConditionalGeneration
from .provenance import data_digest
from .recipe import Recipe
from .report import environment
from .resume import answers_fingerprint, prompts_fingerprint
from .samples import Sample
from .search_space import Space
from .suite import Case, Suite
from .tuned import Tuned
from .tuning_choice import COMPLETE, DOMINATED, UNSOLVED, Rule, Trial, pareto
from .tuning_measures import BENIGN, Validation, dominated
from .tuning_solver import Solver
from .tuning_study import SAMPLERS, Search, load_optuna

STARTS = ("gated", "paper")


def tune(
    model: PreTrainedModel,
    benign: Iterable[Any],
    malicious: Iterable[Any],
    validation: Suite,
    processor=None,
    *,
    exposed: Iterable[Any] | None = None,
    neutral: Iterable[Any] | None = None,
    refused: Iterable[Any] | None = None,
    is_refusal: Callable[[str], bool] = is_refusal,
    judge: Judge | None = None,
    space: Space | None = None,
    rule: Rule | None = None,
    trials: int = 60,
    starts: Sequence[str | Path | Recipe] = STARTS,
    sampler: str = "tpe",
    first_share: float = 0.34,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    out: str | Path | None = None,
) -> Tuned:
    """Search for the recipe of the repair that lets the fewest attacks succeed and changes benign answers the least.

    All prompts are run once, and every trial solves its repair from what was collected, so that it costs an evaluation
    on the validation prompts and no fit. Of every trial the first share of all validation sets is asked first; it is
    pruned if a finished trial is better beyond chance (`tuning_measures.dominated`), or if its recipe has no solution,
    and the result says which and why.

    The result's figures are those of the best of many on the very prompts that chose it: report it on others
    (`Tuned.check_unseen` tells whether they are). Memory: float64 4 d^2 for every place of the family "modality",
    float32 9 d for every place of the family "turn" and every prompt of the fit, and float32 (vocabulary,) for every
    token of the base's answers to benign validation prompts.

    Args:
        model: the base, as for `fit`; stays as it is.
        benign: what repairs are fitted on with the other prompts, see `fit`.
        malicious: see `fit`.
        validation: attacks (or harmful requests, where there are no attacks) and benign prompts to choose by.
        processor: the model's; by default loaded from where the model came from.
        exposed: see `fit`; the family "modality" does without them.
        neutral: see `fit`; benign prompts of the family "modality".
        refused: see `fit`.
        is_refusal: whether an answer to a malicious prompt of the fit is a refusal.
        judge: of the answers to validation prompts; by default keywords.
        space: what is searched; by default `Space.of(model)`; without its visual modality where no prompts have images.
        rule: how one of the trials is chosen; by default `Rule()`.
        trials: how many, pruned ones among them. More than an earlier run in `out` had go on from there.
        starts: recipes that are tried first: names, files or recipes.
        sampler: "tpe", optuna's multi-objective one, or "random".
        first_share: of every validation set, at least one prompt.
        max_new_tokens: of every answer; the divergence is over as many tokens and the answer's end.
        batch_size: validation prompts per forward.
        seed: of the sampler.
        out: a folder that keeps all that is finished: an interrupted tuning comes out as an uninterrupted one would.
            Without, nothing is kept.

    Returns:
        A `Tuned`; `Tuned.save` writes its report.

    Raises:
        ImportError: optuna is not installed.
        TypeError, ValueError: prompts, space and model do not fit together, a validation prompt is one of the fit, or
            `out` holds other work; raised before the first forward. Or no trial was complete.
    """
    optuna = load_optuna()
    model = unwrapped(model)
    processor = processor or load_processor(model)
    counts = {"trials": trials, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    _check(sampler, {**counts, "seed": seed})
    further = {"exposed": exposed, "neutral": neutral, "refused": refused}
    given = {"benign": benign, "malicious": malicious} | {k: v for k, v in further.items() if v is not None}
    solver = Solver(model, processor, given, space, is_refusal)
    starting = [Recipe.load(start) for start in starts]
    begin = [solver.space.parameters(recipe, model) for recipe in starting]
    judge, rule, folder = judge or WordJudge(), rule or Rule(), Path(out) if out else None
    seen = _check_validation(validation, solver)
    asked = Validation(model, processor, validation, judge, first_share, max_new_tokens, batch_size)
    settings = {
        "space": solver.space.to_dict(),
        "starts": [recipe.to_dict() for recipe in starting],
        "sampler": sampler,
        "seed": seed,
        "first_share": first_share,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "judge": [judge.name, judge.settings],
        "validation": {name: len(cases) for name, cases in validation.sets.items()},
    }
    of = _fingerprint(model, processor, solver, validation, settings)
    search = Search(folder, of, solver.space, begin, sampler, seed)
    solver.collect(folder)
    found = search.trials[:trials]
    with logging.tqdm(total=trials, initial=len(found), desc="Tuning", unit="trial") as progress:
        while len(found) < trials:
            found.append(search.next(len(found), lambda n, recipe: try_recipe(n, recipe, solver, asked, found)))
            progress.update()
    chosen, kept = rule.choose(found)
    settings |= {"prompts": {name: len(items) for name, items in solver.prompts.items()}, "fingerprint": of}
    settings |= {"suite": validation.name, "environment": {**environment(), "optuna": optuna.__version__}}
    repair, undefended = solver.solve(chosen.recipe), asked.undefended()
    return Tuned(found, pareto(found), chosen, kept, rule, undefended, repair, settings, frozenset(seen))


def try_recipe(number: int, recipe: Recipe, solver: Solver, asked: Validation, finished: Sequence[Trial]) -> Trial:
    """Solve a recipe and measure its repair, as far as no finished trial is better beyond chance."""
    try:
        subspaces = solver.solve(recipe)
        repaired = CareForConditionalGeneration.from_base(solver.model, subspaces)
    except (ValueError, torch.linalg.LinAlgError) as error:
        return Trial(number, recipe, UNSOLVED, reason=str(error))
    measured = asked.measure(repaired, 0)
    if not np.isfinite(measured.divergences).all():
        return Trial(number, recipe, UNSOLVED, measured, "Its logits are not finite.")
    better = [trial for trial in finished if trial.state == COMPLETE and dominated(measured, trial.measured)]
    if better:
        mean = measured.divergence
        told = f"after {measured.success.n} attacks and {mean.n} benign prompts attack success {measured.success} and "
        told += f"divergence {mean.value:.2g} [{mean.low:.2g}, {mean.high:.2g}], beyond chance no better than trial "
        told += f"{better[0].number}, whose attack success is lower."
        return Trial(number, recipe, DOMINATED, measured, told)
    measured = measured + asked.measure(repaired, 1)
    if not np.isfinite(measured.divergences).all():
        return Trial(number, recipe, UNSOLVED, measured, "Its logits are not finite.")
    return Trial(number, recipe, COMPLETE, measured)


def _check(sampler: str, counts: dict[str, Any]) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is not known; choose one of {SAMPLERS}.")
    for name, value in counts.items():
        least = 0 if name == "seed" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")


def _check_validation(validation: Suite, solver: Solver) -> set[str]:
    """Assert that there are prompts for both objectives, none of them one of the fit; the digests of all prompts."""
    sets = {name: cases for name, cases in validation.sets.items() if len(cases)}
    if not any(name.startswith(BENIGN) for name in sets) or all(name.startswith(BENIGN) for name in sets):
        raise ValueError(
            f"The validation suite {validation.name!r} has the sets {list(sets)}; give attacks (or harmful requests) "
            "and benign prompts."
        )
    seen = set(solver.digests)
    for name, cases in sets.items():
        digests = [Sample(case.messages).digest for case in cases]
        both = [index for index, digest in enumerate(digests) if digest in solver.digests]
        if both:
            raise ValueError(
                f"{len(both)} of the {len(cases)} prompts of {name!r} are prompts of the fit, too (the first is number "
                f"{both[0]}); a choice on them would be on what is fitted. Leave them out of one of the two."
            )
        seen |= set(digests)
    return seen


def _fingerprint(model, processor, solver: Solver, validation: Suite, settings: dict[str, Any]) -> str:
    """A hash of all that trials depend on: of every parameter of the model, some 64 values."""
    fitted = {name: data_digest(items) for name, items in solver.prompts.items()}
    asked = {name: _digest(cases) for name, cases in validation.sets.items()}
    told = [settings, fitted, asked, answers_fingerprint(model, processor)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _digest(cases: Sequence[Case]) -> str:
    """A hash of prompts and of all that judges are told of them."""
    told = [[case.request, case.reference, case.category, list(case.choices)] for case in cases]
    return hashlib.sha256((prompts_fingerprint(cases) + json.dumps(told)).encode()).hexdigest()
