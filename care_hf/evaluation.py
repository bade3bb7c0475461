"""Measure defences side by side: attacks, side effects, and who gets past them by gradient; one cell at a time."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .answers import generate_answers
from .cells import Cells
from .defences import Defence, Steered, Undefended
from .fitting import load_processor
from .judges import Judge, KeywordJudge
from .measuring import divergence, gradient_attack, has_penalty, latency, next_tokens, with_images
from .modeling_care import CareForConditionalGeneration
from .report import Report, environment
from .resume import model_fingerprint
from .samples import Sample
from .suite import Case, Suite

UNDEFENDED, REPAIRED = "undefended", "repaired"
LATENCY_BATCH = 16


@dataclass(frozen=True)
class Budget:
    """How much is measured; the same for every defence.

    Attributes:
        cases: at most so many of every set.
        max_new_tokens: of every answer.
        batch_size: prompts per forward; memory only.
        gradient_cases: at most so many of every pictured family; 0 leaves gradient attacks out.
        eps: radii of gradient attacks in grey levels of 255.
        steps, restarts: of every gradient attack.
        optimisers: of gradient attacks, see `attacks.pgd`; all but the first at the first eps alone.
        weights: of the repair's own penalty in an adaptive attack's loss; 0 is among them.
        curve_steps: after how many steps, at the first eps and by the first optimiser, success is measured as well.
    """

    cases: int = 160
    max_new_tokens: int = 64
    batch_size: int = 32
    gradient_cases: int = 16
    eps: tuple[int, ...] = (16, 32, 64, 255)
    steps: int = 40
    restarts: int = 2
    optimisers: tuple[str, ...] = ("mi-fgsm", "apgd")
    weights: tuple[float, ...] = (0.0, 1.0, 10.0)
    curve_steps: tuple[int, ...] = (5, 10, 20)

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                object.__setattr__(self, item.name, tuple(value))
            elif isinstance(value, int) and value < (item.name != "gradient_cases"):
                raise ValueError(f"{item.name}={value} must be positive.")
        if 0 not in self.weights or not self.optimisers:
            raise ValueError(
                f"weights={self.weights} must hold 0, an attack without the repair's penalty, and "
                f"optimisers={self.optimisers} at least one."
            )

    def quick(self) -> "Budget":
        """A small share of it, to see that everything runs."""
        small: dict[str, Any] = {"cases": 24, "gradient_cases": 4, "eps": self.eps[:1], "steps": 10, "restarts": 1}
        small |= {"optimisers": self.optimisers[:1], "weights": self.weights[:2], "curve_steps": (5,)}
        return Budget(**{**asdict(self), **small})


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
            trained again. Its attribute `settings`, if it has one, goes into the report, and tells its cells apart.
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
    own = _switched(model)
    everything: dict[str, Any] = {**own, **(defences or {})}
    judges = list(judge) if isinstance(judge, (list, tuple)) else [judge or KeywordJudge()]
    _check(suite, defences or {}, own, adaptive, judges)
    run = _Run(model, processor or load_processor(model), suite, judges, budget or Budget(), seed, Cells(out))
    with logging.tqdm(total=len(everything), desc="Evaluating", unit="defence") as progress:
        for name, defence in everything.items():
            progress.set_postfix_str(name)
            run.measure(name, defence, name in own or name in adaptive)
            progress.update()
    settings = {"suite": suite.name, "source": dict(suite.source), "budget": asdict(run.budget), "seed": seed}
    settings |= {"judges": {j.name: j.settings for j in judges}, "defences": run.settings}
    return Report(run.results, {**settings, "environment": environment()})


def _switched(model: nn.Module) -> dict[str, Defence]:
    """A repaired model without and with its repair; any other as it is."""
    if isinstance(model, CareForConditionalGeneration):
        return {UNDEFENDED: Steered(lambda repaired: repaired.disable()), REPAIRED: Undefended()}
    return {UNDEFENDED: Undefended()}


def _check(suite: Suite, given: Mapping, own: Mapping, adaptive: Sequence[str], judges: Sequence[Judge]) -> None:
    if set(given) & set(own):
        raise ValueError(f"The names {sorted(set(given) & set(own))} are taken; give those defences others.")
    unknown = sorted(set(adaptive) - set(given))
    if unknown:
        raise ValueError(f"adaptive={unknown} names no defence; known are {sorted(given)}.")
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


class _Applied:
    """A defence that is put on when it is first needed, and taken off when it is closed."""

    def __init__(self, defence: Defence | Callable[[], Defence], model: nn.Module, processor):
        self._defence, self._model, self._processor = defence, model, processor
        self._stack = contextlib.ExitStack()
        self._defended: nn.Module | None = None

    def __call__(self) -> nn.Module:
        if self._defended is None:
            defence = self._defence if hasattr(self._defence, "applied") else self._defence()
            self._defended = self._stack.enter_context(defence.applied(self._model, self._processor))
        return self._defended

    def close(self) -> None:
        """Take it off."""
        self._stack.close()
        self._defended = None


class _Run:
    """One evaluation: measures defences cell by cell, and holds what was found."""

    def __init__(self, model, processor, suite: Suite, judges, budget: Budget, seed: int, cells: Cells):
        self.model, self.processor, self.judges = model, processor, judges
        self.budget, self.seed, self.cells = budget, seed, cells
        self.sets = {name: list(cases[: budget.cases]) for name, cases in suite.sets.items()}
        self.pictured = {name: list(cases[: budget.gradient_cases]) for name, cases in suite.pictured.items()}
        self.pictured = {name: cases for name, cases in self.pictured.items() if cases}
        self.of_model = model_fingerprint(model)
        self.results: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        self.base_tokens: torch.Tensor | None = None

    def measure(self, name: str, defence: Defence | Callable[[], Defence], adaptive: bool) -> None:
        """Measure one defence."""
        self.settings[name] = dict(getattr(defence, "settings", {}))
        key = {"model": self.of_model, "defence": [name, self.settings[name]], "tokens": self.budget.max_new_tokens}
        results = self.results[name] = {"sets": {}, "gradient": []}
        with contextlib.closing(_Applied(defence, self.model, self.processor)) as applied:
            for label, cases in self.sets.items():
                results["sets"][label] = self._judged({**key, "set": _digest(cases)}, cases, applied)
            results |= self._side_effects(key, applied)
            for family, eps, optimiser in self._grid():
                results["gradient"] += self._transferred(key, name, family, eps, optimiser, applied)
                if adaptive:
                    results["gradient"] += self._adaptive(key, name, family, eps, optimiser, applied)

    def _grid(self) -> Iterator[tuple[str, int, str]]:
        for family in self.pictured:
            for eps in self.budget.eps:
                for optimiser in self.budget.optimisers if eps == self.budget.eps[0] else self.budget.optimisers[:1]:
                    yield family, eps, optimiser

    def _judged(self, key: dict, cases: Sequence[Case], applied: _Applied) -> dict[str, Any]:
        """Answers, and what every judge says of them."""
        tokens, size = self.budget.max_new_tokens, self.budget.batch_size
        answers = self.cells.get(key, lambda: generate_answers(applied(), self.processor, cases, tokens, size))
        said = {}
        for judge in self.judges:
            of_judge = {"judge": [judge.name, judge.settings], "cases": _digest(cases), "answers": answers}
            said[judge.name] = self.cells.get(of_judge, lambda judge=judge: judge.verdicts(cases, answers))
        return {"answers": answers, "verdicts": said}

    def _side_effects(self, key: dict, applied: _Applied) -> dict[str, Any]:
        """Divergence from the base on benign prompts, and time."""
        benign = [case for name, cases in self.sets.items() if name.startswith("benign/") for case in cases]
        if not benign:
            return {"divergence": None, "latency": None}
        size, tokens = self.budget.batch_size, self.budget.max_new_tokens

        def of_tokens() -> float | None:
            found = next_tokens(applied(), self.processor, benign, size)
            return None if found is None else divergence(self._base_tokens(benign), found)

        def of_time() -> dict[str, Any]:
            some = benign[:: max(1, len(benign) // LATENCY_BATCH)][:LATENCY_BATCH]
            return latency(self.model, applied(), self.processor, some, tokens)

        asked = {**key, "set": _digest(benign)}
        return {
            "divergence": self.cells.get({**asked, "of": "divergence"}, of_tokens),
            "latency": self.cells.get({**asked, "of": "latency"}, of_time),
        }

    def _base_tokens(self, benign: Sequence[Case]) -> torch.Tensor:
        if self.base_tokens is None:
            with self._undefended() as model:
                self.base_tokens = next_tokens(model, self.processor, benign, self.budget.batch_size)
        return self.base_tokens

    def _undefended(self):
        return _switched(self.model)[UNDEFENDED].applied(self.model, self.processor)

    def _attack(self, key: dict, family: str, eps: int, optimiser: str, weight: float, through) -> dict[str, Any]:
        """What an attack through the model that `through()` gives finds."""
        budget, cases = self.budget, self.pictured[family]
        settings = {"eps": eps, "steps": budget.steps, "restarts": budget.restarts, "optimiser": optimiser}
        if (eps, optimiser) == (budget.eps[0], budget.optimisers[0]):
            settings["keep_steps"] = [step for step in budget.curve_steps if step < budget.steps]

        def make() -> dict[str, Any]:
            rest = {"weight": weight, "seed": self.seed, "batch_size": budget.batch_size}
            return gradient_attack(through(), self.processor, cases, **settings, **rest)

        return self.cells.get({**key, "attack": [_digest(cases), settings, weight], "seed": self.seed}, make)

    def _rows(self, key: dict, row: dict, found: dict, applied: _Applied) -> list[dict]:
        """One row per number of steps: what the defended model answers to the images that were found."""
        rows = []
        for steps, images in found["images"].items():
            cases = with_images(self.pictured[row["family"]], images)
            judged = self._judged({**key, "set": _digest(cases)}, cases, applied)
            rows.append({**row, "steps": int(steps), **judged})
        rows[-1] |= {name: value for name, value in found.items() if name != "images"}
        return rows

    def _transferred(
        self, key: dict, name: str, family: str, eps: int, optimiser: str, applied: _Applied
    ) -> list[dict]:
        """Images that the attack on the undefended model found, shown to this one."""
        with contextlib.ExitStack() as stack:

            def undefended() -> nn.Module:
                switched = _switched(self.model)[UNDEFENDED]
                return stack.enter_context(switched.applied(self.model, self.processor))

            found = self._attack({**key, "defence": [UNDEFENDED, {}]}, family, eps, optimiser, 0.0, undefended)
        row = {"through": UNDEFENDED, "family": family, "eps": eps, "optimiser": optimiser, "weight": 0.0}
        return self._rows(key, row, found, applied)

    def _adaptive(self, key: dict, name: str, family: str, eps: int, optimiser: str, applied: _Applied) -> list[dict]:
        """Images that attacks through this very defence found."""
        if name == UNDEFENDED:
            return []  # its own attack is the one that is transferred
        rows = []
        # Kept, so that a defence is not trained again only to be asked.
        penalised = self.cells.get({**key, "of": "penalty"}, lambda: has_penalty(applied()))
        for weight in self.budget.weights if penalised else (0.0,):
            found = self._attack(key, family, eps, optimiser, weight, applied)
            row = {"through": name, "family": family, "eps": eps, "optimiser": optimiser, "weight": weight}
            rows += self._rows(key, row, found, applied)
        return rows


def _digest(cases: Sequence[Case]) -> str:
    """A hash of prompts and of all that judges are told."""
    digest = hashlib.sha256()
    for case in cases:
        told = [case.request, case.reference, case.target, case.category, list(case.choices)]
        digest.update((Sample(case.messages).digest + json.dumps(told)).encode())
    return digest.hexdigest()
