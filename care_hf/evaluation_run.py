"""One evaluation as it goes: every defence put on, measured cell by cell, and taken off."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .answers import generate_answers
from .budget import Budget
from .cells import Cells
from .defences import Defence, Steered, Undefended
from .measuring import (
    divergence,
    gradient_attack,
    has_penalty,
    latency,
    next_tokens,
    universal_attack,
    with_images,
)
from .modeling_care import CareForConditionalGeneration
from .report import TOXIC, UNIVERSAL
from .resume import answers_fingerprint
from .samples import Sample
from .suite import Case, Suite
from .teacher_forcing import encode

UNDEFENDED, REPAIRED = "undefended", "repaired"
LATENCY_BATCH = 16


def switched(model: nn.Module) -> dict[str, Defence]:
    """A repaired model without and with its repair; any other as it is."""
    if isinstance(model, CareForConditionalGeneration):
        return {UNDEFENDED: Steered(lambda m: m.disable()), REPAIRED: Steered(lambda m: m.enable())}
    return {UNDEFENDED: Undefended()}


class Applied:
    """A defence that is put on when it is first needed, and taken off when it is closed."""

    def __init__(self, defence: Defence | Callable[[], Defence], model: nn.Module, processor):
        self._defence, self._model, self._processor = defence, model, processor
        self._stack = contextlib.ExitStack()
        self._made: Defence | None = None
        self._defended: nn.Module | None = None

    def __call__(self) -> nn.Module:
        """The defended model."""
        if self._defended is None:
            if self._made is None:
                self._made = self._defence if hasattr(self._defence, "applied") else self._defence()
            self._defended = self._stack.enter_context(self._made.applied(self._model, self._processor))
        return self._defended

    def close(self) -> None:
        """Take it off; the next call puts the same one on again."""
        self._defended = None
        self._stack.close()

    @contextlib.contextmanager
    def for_a_while(self) -> Iterator[nn.Module]:
        """While entered, gives the defended model; afterwards it is off."""
        try:
            yield self()
        finally:
            self.close()


class Run:
    """One evaluation: measures defences cell by cell, and holds what was found."""

    def __init__(self, model, processor, suite: Suite, judges, budget: Budget, seed: int, cells: Cells):
        self.model, self.processor, self.judges = model, processor, judges
        self.budget, self.seed, self.cells = budget, seed, cells
        self.sets = {name: list(cases[: budget.cases]) for name, cases in suite.sets.items()}
        self.pictured = {name: list(cases[: budget.gradient_cases]) for name, cases in suite.pictured.items()}
        self.pictured = {name: cases for name, cases in self.pictured.items() if cases}
        self.toxic = _toxic([case for cases in self.pictured.values() for case in cases], suite.corpus, budget)
        for cases in self.pictured.values():  # a processor that no gradient goes through is named now, not hours later
            encode(model, processor, [Sample(cases[0].messages)], [cases[0].target])
        first, last = budget.gradient_cases, budget.gradient_cases + budget.universal_cases
        self.made_on = [case for name in self.pictured for case in suite.pictured[name][first:last]]
        self._check_one_size()
        texts = {"jailbreak": [suite.affirmation], "toxic": list(suite.corpus)}
        self.universal = {UNIVERSAL + kind: wanted for kind, wanted in texts.items() if wanted and self.made_on}
        self.of_model = answers_fingerprint(model, self.processor)
        self.results: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        self.base_tokens: torch.Tensor | None = None
        self.found: dict[tuple, dict[str, Any]] = {}  # by attacks on the undefended model, which is measured first

    def _check_one_size(self) -> None:
        cases = [case for family in self.pictured.values() for case in family] if self.made_on else []
        sizes = {Sample(case.messages).images[0].size for case in [*cases, *self.made_on]}
        if len(sizes) > 1:
            raise ValueError(
                f"Pictured cases have images of the sizes {sorted(sizes)}, and one perturbation fits one size; resize "
                "them, or set `universal_cases` to 0."
            )

    def measure(self, name: str, defence: Defence | Callable[[], Defence], adaptive: bool) -> None:
        """Measure one defence."""
        self.settings[name] = dict(getattr(defence, "settings", {}))
        told = [name, self.settings[name], *([defence.digest] if hasattr(defence, "digest") else [])]
        key = {"model": self.of_model, "defence": told, "tokens": self.budget.max_new_tokens}
        results = self.results[name] = {"sets": {}, "gradient": []}
        with contextlib.closing(Applied(defence, self.model, self.processor)) as applied:
            for label, cases in self.sets.items():
                results["sets"][label] = self._judged({**key, "set": _digest(cases)}, cases, applied)
            results |= self._side_effects(key, applied)
            for family, eps, optimiser in self._grid():
                results["gradient"] += self._transferred(key, name, family, eps, optimiser, applied)
                if adaptive and name != UNDEFENDED:  # whose own attack is the one that is transferred
                    results["gradient"] += self._adaptive(key, name, family, eps, optimiser, applied)

    def _grid(self) -> Iterator[tuple[str, int, str]]:
        for family in self.pictured:
            for eps in self.budget.eps:
                for optimiser in self.budget.optimisers if eps == self.budget.eps[0] else self.budget.optimisers[:1]:
                    yield family, eps, optimiser
        for family in [TOXIC] * bool(self.toxic) + list(self.universal):
            for eps in dict.fromkeys((self.budget.eps[0], self.budget.eps[-1])):
                yield family, eps, self.budget.optimisers[0]

    def _attacked(self, family: str) -> list[Case]:
        """What an attack on `family` is tried on; a universal one on those of all families."""
        if family in self.universal:
            return [case for cases in self.pictured.values() for case in cases]
        return self.toxic if family == TOXIC else self.pictured[family]

    def _judged(self, key: dict, cases: Sequence[Case], applied: Applied) -> dict[str, Any]:
        """Answers, and what every judge says of them."""
        tokens, size = self.budget.max_new_tokens, self.budget.batch_size
        answers = self.cells.get(key, lambda: generate_answers(applied(), self.processor, cases, tokens, size))
        said = {}
        for judge in self.judges:
            of_judge = {"judge": [judge.name, judge.settings], "cases": _digest(cases), "answers": answers}
            said[judge.name] = self.cells.get(of_judge, lambda judge=judge: judge.verdicts(cases, answers))
        return {"answers": answers, "verdicts": said}

    def _side_effects(self, key: dict, applied: Applied) -> dict[str, Any]:
        """Divergence from the base on benign prompts, and time."""
        benign = [case for name, cases in self.sets.items() if name.startswith("benign/") for case in cases]
        if not benign:
            return {"divergence": None, "latency": None}
        size, tokens = self.budget.batch_size, self.budget.max_new_tokens

        def of_tokens() -> float | None:
            if self.base_tokens is None:
                applied.close()  # it may be on the very model that is the base
                with self._undefended() as model:
                    self.base_tokens = next_tokens(model, self.processor, benign, size)
            found = next_tokens(applied(), self.processor, benign, size)
            return None if found is None else divergence(self.base_tokens, found)

        def of_time() -> dict[str, Any]:
            some = benign[:: max(1, len(benign) // LATENCY_BATCH)][:LATENCY_BATCH]
            applied.close()
            return latency(self._undefended, applied.for_a_while, self.processor, some, tokens)

        asked = {**key, "set": _digest(benign)}
        return {
            "divergence": self.cells.get({**asked, "of": "divergence"}, of_tokens),
            "latency": self.cells.get({**asked, "of": "latency"}, of_time),
        }

    def _undefended(self):
        return switched(self.model)[UNDEFENDED].applied(self.model, self.processor)

    def _attack(self, key: dict, family: str, eps: int, optimiser: str, weight: float, through) -> dict[str, Any]:
        """What an attack through the model that `through()` gives finds."""
        budget, cases = self.budget, self._attacked(family)
        settings = {"eps": eps, "steps": budget.steps, "restarts": budget.restarts, "optimiser": optimiser}
        if (eps, optimiser) == (budget.eps[0], budget.optimisers[0]):
            settings["keep_steps"] = [step for step in budget.curve_steps if step < budget.steps]
        rest = {"weight": weight, "seed": self.seed, "batch_size": budget.batch_size}
        if family in self.universal:
            wanted, made_on = self.universal[family], self.made_on
            settings |= {"keep_steps": (), "restarts": 1}
            asked = {**key, "attack": [_digest(made_on), _digest(cases), wanted, settings, weight], "seed": self.seed}
            return self.cells.get(
                asked,
                lambda: universal_attack(through(), self.processor, made_on, cases, wanted, **settings, **rest),
            )
        return self.cells.get(
            {**key, "attack": [_digest(cases), settings, weight], "seed": self.seed},
            lambda: gradient_attack(through(), self.processor, cases, **settings, **rest),
        )

    def _rows(self, key: dict, row: dict, found: dict, applied: Applied) -> list[dict]:
        """One row per number of steps: what the defended model answers to the images that were found."""
        rows = []
        for steps, images in found["images"].items():
            cases = with_images(self._attacked(row["family"]), images)
            judged = self._judged({**key, "set": _digest(cases)}, cases, applied)
            rows.append({**row, "steps": int(steps), **judged})
        rows[-1] |= {name: value for name, value in found.items() if name != "images"}
        return rows

    def _transferred(self, key: dict, name: str, family: str, eps: int, optimiser: str, applied: Applied) -> list[dict]:
        """Images that the attack on the undefended model found, shown to this one."""
        attack = family, eps, optimiser
        if name == UNDEFENDED:
            self.found[attack] = self._attack(key, *attack, 0.0, applied)
        found = self.found[attack]
        row = {"through": UNDEFENDED, "family": family, "eps": eps, "optimiser": optimiser, "weight": 0.0}
        return self._rows(key, row, found, applied)

    def _adaptive(self, key: dict, name: str, family: str, eps: int, optimiser: str, applied: Applied) -> list[dict]:
        """Images that attacks through this very defence found."""
        rows = []
        # Kept, so that a defence is not trained again only to be asked.
        penalised = self.cells.get({**key, "of": "penalty"}, lambda: has_penalty(applied()))
        weights = self.budget.weights if eps == self.budget.eps[0] else self.budget.weights[-1:]
        for weight in weights if penalised else (0.0,):
            found = self._attack(key, family, eps, optimiser, weight, applied)
            row = {"through": name, "family": family, "eps": eps, "optimiser": optimiser, "weight": weight}
            rows += self._rows(key, row, found, applied)
        return rows


def _toxic(cases: Sequence[Case], corpus: Sequence[str], budget: Budget) -> list[Case]:
    """Some cases, evenly from all, each with a sentence that it is to be made to say, whatever it asks."""
    count = min(budget.gradient_cases, len(cases)) if corpus else 0
    chosen = [cases[i * len(cases) // count] for i in range(count)]
    sentences = [corpus[i % len(corpus)] for i in range(count)]
    return [replace(case, target=text, reference=text) for case, text in zip(chosen, sentences, strict=True)]


def _digest(cases: Sequence[Case]) -> str:
    """A hash of prompts and of all that judges are told."""
    digest = hashlib.sha256()
    for case in cases:
        told = [case.request, case.reference, case.target, case.category, list(case.choices)]
        # Texts and images have their own order in `Sample.digest`; where the images stand among the texts is told here.
        told.append([[part["type"] for part in message["content"]] for message in case.messages])
        digest.update((Sample(case.messages).digest + json.dumps(told)).encode())
    return digest.hexdigest()
