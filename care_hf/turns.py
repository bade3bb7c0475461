"""Record what a model does where it decides: at the last token of its prompts and at the first tokens of an answer."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from . import collection
from .answers import answer_batch
from .batching import first_size, run_batches
from .collection import PromptFacts
from .detectors import Cell, Prompts
from .processes import Processes, joined
from .provenance import origin
from .reading import read
from .recipe import Recipe
from .samples import IGNORED, Sample, Samples, answered, collate, generation_prompt
from .shared_collection import SharedCollection
from .site_check import check_contributions
from .sites import Site
from .spans import Spans, missing, size, tidy

MIN_REFUSED = 16  # of which a mean is taken for an anchor


@dataclass(frozen=True, eq=False)
class Turns:
    """What was recorded of all prompts, n of them; activations float32.

    Attributes:
        cells, groups: of every prompt.
        refused: bool (n,), whether the model refuses the prompt by itself.
        prompt_end: the token ids that end every prompt.
        gate_site: what the gate reads.
        gate: (n, d), the last token of the prompt there.
        repaired: per repaired site (n, 1 + T, d), the last token of the prompt and the first T tokens of a refusal: the
            model's own, or, where it does not refuse, one that it gave elsewhere; NaN where the refusal is shorter.
        origin: of model and prompts, see `provenance.origin`.
    """

    cells: list[Cell]
    groups: list[tuple[str, ...]]
    refused: torch.Tensor
    prompt_end: tuple[int, ...]
    gate_site: Site
    gate: torch.Tensor
    repaired: Mapping[Site, torch.Tensor]
    origin: Mapping[str, str] = field(default_factory=dict)

    @property
    def prompts(self) -> Prompts:
        """As the detectors take them."""
        return Prompts(self.gate, self.cells, self.groups)

    def of(self, *classes: str) -> torch.Tensor:
        """Which prompts are of these classes, bool (n,)."""
        return torch.tensor([cell.of in classes for cell in self.cells])


def record_turns(
    model: PreTrainedModel,
    processor,
    samples: Mapping[str, Samples],
    known_refused: int,
    recipe: Recipe,
    judge: Callable[[str], bool],
    resume: Path | None = None,
    update: Path | None = None,
) -> Turns:
    """Have the model answer the malicious prompts, and record every prompt with a refusal for its answer.

    All processes come here with the same, see `fitting.fit`.

    Args:
        model: the undefended model.
        processor: its processor.
        samples: prompts per class of `detectors.CLASSES`; with `update`, those to add.
        known_refused: how many of the malicious prompts, the first ones, count as refused whatever the judge says.
        recipe: its sites, steps and batch size.
        judge: tells whether an answer is a refusal.
        resume: a file that keeps what is recorded.
        update: such a file of earlier prompts, to which these are added.

    Raises:
        ValueError: fewer than `MIN_REFUSED` malicious prompts are refused, or a file does not fit.
        FileNotFoundError: there is no file `update`.
        FloatingPointError: an activation is not finite.
        torch.OutOfMemoryError: memory does not suffice for a single prompt.
        ProcessFailed: another process failed.
    """
    with joined() as together:
        return _record_turns(together, model, processor, samples, known_refused, recipe, judge, resume, update)


def _record_turns(
    together: Processes,
    model: PreTrainedModel,
    processor,
    samples: Mapping[str, Samples],
    known_refused: int,
    recipe: Recipe,
    judge: Callable[[str], bool],
    resume: Path | None,
    update: Path | None,
) -> Turns:
    recorder = _Recorder(model, processor, recipe)
    known = {"malicious": known_refused}
    given = {name: PromptFacts.of(items, known.get(name, 0)) for name, items in samples.items()}
    shared = SharedCollection(together, model, recorder.work(), given, resume, update)
    kept = shared.kept
    if ("exposed" in kept.prompts) != ("neutral" in kept.prompts):
        raise ValueError("`exposed` and `neutral` prompts are told from one another; give both or neither.")
    shared.begin(recorder)
    recorder.hear_of_all(shared)
    known_ones = kept.prompts["malicious"].known
    recorder.check_judge(judge, known_ones)
    for items in list(samples.values())[:1]:
        check_contributions(model, recorder.sites, collate(processor, items[:1], ()).inputs)

    def run(description: str, todo: Mapping[str, Spans], finished: int, compute: Callable, keep: Callable) -> None:
        run_batches(
            model,
            todo,
            lambda name, start, stop: compute(name, kept.batch(samples, name, start, stop), start),
            keep,
            size=first_size(recipe.batch_size, model),
            description=description,
            finished=finished,
            save=lambda: recorder.save(kept),
            together=together,
        )

    answered = recorder.answered
    unanswered = missing(answered, kept.counts["malicious"])
    run("Answering", {"malicious": shared.own(unanswered)}, size(answered), recorder.ask, recorder.hear)
    recorder.hear_of_all(shared)
    recorder.judge(judge, known_ones, together)
    run("Recording turns", shared.todo(), sum(map(size, shared.done.values())), recorder.read, recorder.keep)
    recorder.join(shared)
    shared.finish(recorder)
    asked_by = f"{getattr(judge, '__module__', '')}.{getattr(judge, '__qualname__', type(judge).__qualname__)}"
    prompts, turns = recorder.turns(kept.prompts)
    return replace(turns, origin=origin(model, prompts, judge=asked_by))


Recorded = dict[str, torch.Tensor]  # of a batch, under "gate" (B, d), under every site's name (B, 1 + T, d); float32


class _Recorder:
    """Collects answers and activations, batch by batch."""

    def __init__(self, model: PreTrainedModel, processor, recipe: Recipe):
        self.model, self.processor, self.recipe = model, processor, recipe
        self.sites, self.gate_site = recipe.find_sites(model), recipe.gate_site(model)
        self.prompt_end = generation_prompt(processor)
        self.answers: dict[int, str] = {}  # of malicious prompts, by their number
        self.refused: list[bool] = []
        self.refusals: list[str] = []
        self.parts: dict[str, list[tuple[int, Recorded]]] = {}  # with the number of its first prompt

    def work(self) -> dict[str, Any]:
        """What the recording depends on beside the prompts."""
        settings = {"sites": list(map(str, self.sites)), "gate_site": str(self.gate_site), "steps": self.recipe.steps}
        return collection.describe("turns", self.model, self.processor, settings)

    @property
    def done(self) -> dict[str, Spans]:
        """Which prompts of every class are recorded."""
        return {
            name: tidy(range(start, start + len(part["gate"])) for start, part in parts)
            for name, parts in self.parts.items()
        }

    @property
    def answered(self) -> Spans:
        """Which malicious prompts have an answer."""
        return tidy(range(index, index + 1) for index in self.answers)

    def ask(self, name: str, samples: Sequence[Sample], start: int) -> dict[int, str]:
        """Have the model answer one batch, whose first prompt is the `start`-th of its class."""
        answers = answer_batch(self.model, self.processor, samples, 2 * self.recipe.steps)
        return dict(enumerate(answers, start))

    def hear(self, name: str, answers: dict[int, str]) -> None:
        """Keep what `ask` gave."""
        self.answers = {**self.answers, **answers}

    def hear_of_all(self, shared: SharedCollection) -> None:
        """Keep what all processes heard, and which of it was taken for refusals."""
        told = shared.gather((self.answers, self.refused))
        answers = {index: answer for heard, _ in told for index, answer in heard.items()}
        self.answers = dict(sorted(answers.items()))
        self.refused = told[0][1]

    def check_judge(self, judge: Callable[[str], bool], known: Sequence[int]) -> None:
        """Assert that answers are judged as they were when prompts were recorded.

        Raises:
            ValueError: they are not.
        """
        if self.refused != _judged([self.answers[i] for i in range(len(self.refused))], judge, known):
            raise ValueError(
                "What was recorded earlier was with another judge, to whom other answers were refusals; pass that one "
                "as `judge=`, or delete the file or name another."
            )

    def judge(self, judge: Callable[[str], bool], known: Sequence[int], together: Processes) -> None:
        """Find out which answers are refusals, those to the prompts `known` in any case; the main process is asked.

        Raises:
            ValueError: fewer than `MIN_REFUSED` are.
        """
        before, answers = len(self.refused), list(self.answers.values())
        new = _judged(answers[before:], judge, [i - before for i in known]) if together.main else []
        refused = self.refused + together.broadcast(new)
        if sum(refused) < MIN_REFUSED:
            shown = next((answer for answer, is_one in zip(answers, refused, strict=True) if not is_one), "")
            raise ValueError(
                f"The model refuses {sum(refused)} of {len(refused)} malicious prompts, and at least {MIN_REFUSED} are "
                "needed to learn what it does when it refuses. Add harmful requests in plain words that it refuses, "
                "pass such as `refused=`, or pass a `judge=` if refusals read otherwise; an answer taken for none: "
                f"{shown!r}."
            )
        self.refused = refused
        # The first ones alone, which stay the first when prompts are added.
        self.refusals = [a for a, is_one in zip(answers, refused, strict=True) if is_one][:MIN_REFUSED]

    def refusal_after(self, name: str, index: int) -> str:
        """The refusal to record after a prompt: the model's own, or another prompt's in turn."""
        own = name == "malicious" and self.refused[index]
        return self.answers[index] if own else self.refusals[index % len(self.refusals)]

    def read(self, name: str, samples: Sequence[Sample], start: int) -> tuple[int, Recorded]:
        """Record one batch, whose first prompt is the `start`-th of its class, with refusals forced."""
        answers = [self.refusal_after(name, index) for index in range(start, start + len(samples))]
        inputs, labels = answered(self.processor, samples, answers, end=False)
        activations = read(self.model, [self.gate_site, *self.sites], inputs)
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("gate", *map(str, self.sites))}
        lengths = (labels != IGNORED).sum(dim=1)
        begins = inputs["attention_mask"].sum(dim=1) - lengths
        for row, (length, begin) in enumerate(zip(lengths.tolist(), begins.tolist(), strict=True)):
            last = begin - 1
            parts["gate"].append(activations[self.gate_site][row, last].float().cpu()[None])
            for site in self.sites:
                known = activations[site][row, last : last + 1 + min(length, self.recipe.steps)].float().cpu()
                steps = torch.full((1, 1 + self.recipe.steps, known.shape[-1]), torch.nan)
                steps[0, : len(known)] = known
                parts[str(site)].append(steps)
        whole = {place: torch.cat(tensors) for place, tensors in parts.items()}
        for place, tensor in whole.items():
            if not torch.isfinite(tensor if place == "gate" else tensor[:, 0]).all():
                raise FloatingPointError(
                    f"Activations ({place}) are not finite; check the model's weights, or load it in bfloat16 or "
                    "float32 if it is in float16."
                )
        return start, whole

    def keep(self, name: str, found: tuple[int, Recorded]) -> None:
        """Keep what `read` gave."""
        self.parts.setdefault(name, []).append(found)

    def save(self, into: collection.Collection) -> None:
        """Write what was recorded so far."""
        tensors = {f"{name}.{place}": h for name in self.parts for place, h in self._joined(name).items()}
        # A list of all of them, as far as there are any.
        answers = [self.answers.get(index) for index in range(max(self.answers, default=-1) + 1)]
        into.save(tensors, self.done, answers=json.dumps(answers), refused=json.dumps(self.refused))

    def take(self, kept: collection.Collection) -> None:
        """Add what `save` wrote."""
        heard, refused = json.loads(kept.notes["answers"]), json.loads(kept.notes["refused"])
        self.hear("malicious", {index: answer for index, answer in enumerate(heard) if answer is not None})
        self.refused = max(self.refused, refused, key=len)
        found: dict[str, Recorded] = {}
        for key, tensor in kept.tensors.items():
            name, _, place = key.partition(".")
            found.setdefault(name, {})[place] = tensor
        for name, recorded in found.items():
            spans = kept.done[name]
            cut = {place: h.split(list(map(len, spans))) for place, h in recorded.items()}
            for i, span in enumerate(spans):
                self.keep(name, (span.start, {place: pieces[i] for place, pieces in cut.items()}))

    def join(self, shared: SharedCollection) -> None:
        """Make what all processes recorded the own."""
        if shared.together.count == 1:
            return
        self.parts, told = {}, shared.gather(self.parts)
        for parts in told:
            for name, found in parts.items():
                for part in found:
                    self.keep(name, part)

    def turns(self, prompts: Mapping[str, PromptFacts]) -> tuple[dict[str, PromptFacts], Turns]:
        """All that was recorded, the prompts known to be refused before the others, and the prompts in that order."""
        ordered, cells, groups, flags, recorded = {}, [], [], [], []
        for name, facts in prompts.items():
            order, found = facts.known_first(), self._joined(name)
            if order != sorted(order):
                facts, found = facts.take(order), {place: h[order] for place, h in found.items()}
            ordered[name] = facts
            pictured = set(facts.pictured)
            cells += [Cell(name, kind, i in pictured) for i, kind in enumerate(facts.kinds)]
            # A prompt without a group shares nothing with any other.
            groups += [labels or (f"{name} {i}",) for i, labels in enumerate(facts.groups)]
            flags += [self.refused[i] for i in order] if name == "malicious" else [False] * len(facts)
            recorded.append(found)
        whole = {place: torch.cat([part[place] for part in recorded]) for place in recorded[0]}
        repaired = {site: whole[str(site)] for site in self.sites}
        flags = torch.tensor(flags)
        return ordered, Turns(cells, groups, flags, self.prompt_end, self.gate_site, whole["gate"], repaired)

    def _joined(self, name: str) -> Recorded:
        parts = [part for _, part in sorted(self.parts[name], key=lambda one: one[0])]
        return {place: torch.cat([part[place] for part in parts]) for place in parts[0]}


def _judged(answers: Sequence[str], judge: Callable[[str], bool], known: Sequence[int]) -> list[bool]:
    """Which answers are refusals: those that `judge` takes for such, and those of the indices `known`."""
    certain = set(known)
    return [judge(answer) or i in certain for i, answer in enumerate(answers)]
