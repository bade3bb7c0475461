"""Record what a model does where it decides: at the last token of its prompts and at the first tokens of an answer."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from . import resume as resuming
from .answers import generate_answers
from .detectors import Cell, Prompts
from .provenance import origin
from .recipe import Recipe
from .samples import IGNORED, Sample, Samples, answered, collate, generation_prompt
from .site_check import check_contributions
from .sites import Site, hidden_size, record

MIN_REFUSED = 16  # of which a mean is taken for an anchor
RECORDING_FIELDS = ("scope", "layers", "component", "sites", "gate_layer", "steps", "batch_size", "seed")


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
) -> Turns:
    """Have the model answer the malicious prompts, and record every prompt with a refusal for its answer.

    Args:
        model: the undefended model.
        processor: its processor.
        samples: prompts per class of `detectors.CLASSES`.
        known_refused: how many of the malicious prompts, the last ones, count as refused whatever the judge says.
        recipe: its sites, steps, batch size and seed.
        judge: tells whether an answer is a refusal.
        resume: a file that keeps what is recorded.

    Raises:
        ValueError: fewer than `MIN_REFUSED` malicious prompts are refused, or `resume` belongs to other work.
        FloatingPointError: an activation is not finite.
    """
    settings = {name: value for name, value in recipe.to_dict().items() if name in RECORDING_FIELDS}
    recorder = _Recorder(model, processor, recipe)
    check_contributions(model, recorder.sites, collate(processor, samples["benign"][: recipe.batch_size], ()).inputs)
    of = resuming.fingerprint(model, processor, samples, {**settings, "refused": known_refused})
    if resume and resume.exists():
        recorder.load(*resuming.load(resume, of))
    size = recipe.batch_size
    asked = [("malicious", start) for start in range(0, len(samples["malicious"]), size)]
    read = [(name, start) for name, items in samples.items() for start in range(0, len(items), size)]
    refused: list[bool] = []
    progress = logging.tqdm(total=len(asked) + len(read), initial=recorder.done, desc="Recording turns", unit="batch")
    saved = time.monotonic()
    was_training = model.training
    model.eval()
    try:
        with progress:
            for index, (name, start) in enumerate([*asked, *read]):
                if index == len(asked):
                    refused = judge_answers(recorder.answers, judge, known_refused)
                    recorder.take_up(refused)
                if index < recorder.done:
                    continue
                batch = samples[name][start : start + size]
                if index < len(asked):
                    recorder.ask(batch)
                else:
                    own = recorder.own_refusals(name, start, len(batch), refused)
                    recorder.read(batch, own)
                recorder.done += 1
                progress.update()
                if resume and time.monotonic() - saved >= resuming.SAVE_SECONDS:
                    recorder.save(resume, of)
                    saved = time.monotonic()
    finally:
        model.train(was_training)
        if resume:
            recorder.save(resume, of)
    asked_by = f"{getattr(judge, '__module__', '')}.{getattr(judge, '__qualname__', type(judge).__qualname__)}"
    return replace(recorder.turns(samples, refused), origin=origin(model, samples, judge=asked_by))


def judge_answers(answers: Sequence[str], judge: Callable[[str], bool], known_refused: int) -> list[bool]:
    """Which malicious prompts are refused, the last `known_refused` of them in any case.

    Raises:
        ValueError: fewer than `MIN_REFUSED` are.
    """
    refused = [judge(answer) or i >= len(answers) - known_refused for i, answer in enumerate(answers)]
    if sum(refused) < MIN_REFUSED:
        shown = next((answer for answer, is_one in zip(answers, refused, strict=True) if not is_one), "")
        raise ValueError(
            f"The model refuses {sum(refused)} of {len(answers)} malicious prompts, and at least {MIN_REFUSED} are "
            "needed to learn what it does when it refuses. Add harmful requests in plain words that it refuses, pass "
            f"such as `refused=`, or pass a `judge=` if refusals read otherwise; an answer taken for none: {shown!r}."
        )
    return refused


class _Recorder:
    """Collects answers and activations, batch by batch."""

    def __init__(self, model: PreTrainedModel, processor, recipe: Recipe):
        self.model, self.processor, self.recipe = model, processor, recipe
        self.sites, self.gate_site = recipe.find_sites(model), recipe.gate_site(model)
        self.prompt_end = generation_prompt(processor)
        self.done = 0
        self.answers: list[str] = []
        self.refused: list[bool] | None = None
        self.refusals: list[str] = []
        self.parts: dict[str, list[torch.Tensor]] = {"gate": [], **{str(s): [] for s in self.sites}}

    def ask(self, samples: Sequence[Sample]) -> None:
        """Have the model answer one batch."""
        self.answers += generate_answers(self.model, self.processor, samples, 2 * self.recipe.steps, len(samples))

    def take_up(self, refused: list[bool]) -> None:
        """Hear which answers are refusals."""
        if self.refused not in (None, refused):
            raise ValueError("What is resumed was recorded with another judge; delete it or name another file.")
        self.refused = refused
        self.refusals = [answer for answer, is_one in zip(self.answers, refused, strict=True) if is_one]

    def own_refusals(self, name: str, start: int, count: int, refused: Sequence[bool]) -> list[str]:
        """The refusal to record after each prompt of a batch: the model's own, or another prompt's in turn."""
        texts = []
        for index in range(start, start + count):
            own = name == "malicious" and refused[index]
            texts.append(self.answers[index] if own else self.refusals[index % len(self.refusals)])
        return texts

    @torch.no_grad()
    def read(self, samples: Sequence[Sample], answers: Sequence[str]) -> None:
        """Record one batch, its answers forced."""
        inputs, labels = answered(self.processor, samples, answers, end=False)
        inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
        with record(self.model, [self.gate_site, *self.sites]) as activations:
            self.model.base_model(**inputs, use_cache=False)
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in self.parts}
        lengths = (labels != IGNORED).sum(dim=1)
        begins = inputs["attention_mask"].cpu().sum(dim=1) - lengths
        for row, (length, begin) in enumerate(zip(lengths.tolist(), begins.tolist(), strict=True)):
            last = begin - 1
            parts["gate"].append(activations[self.gate_site][row, last].float().cpu()[None])
            for site in self.sites:
                known = activations[site][row, last : last + 1 + min(length, self.recipe.steps)].float().cpu()
                steps = torch.full((1, 1 + self.recipe.steps, known.shape[-1]), torch.nan)
                steps[0, : len(known)] = known
                parts[str(site)].append(steps)
        joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
        for name, tensor in joined.items():
            if not torch.isfinite(tensor if name == "gate" else tensor[:, 0]).all():
                raise FloatingPointError(
                    f"Activations ({name}) are not finite; check the model's weights, or load it in bfloat16 or "
                    "float32 if it is in float16."
                )
        for name, tensor in joined.items():
            self.parts[name].append(tensor)

    def save(self, path: Path, of: str) -> None:
        """Write what was recorded so far."""
        width = hidden_size(self.model)
        tensors = {name: torch.cat(parts) if parts else torch.zeros(0, width) for name, parts in self.parts.items()}
        notes = {"answers": json.dumps(self.answers), "refused": json.dumps(self.refused)}
        resuming.save(path, tensors, of, done=str(self.done), **notes)

    def load(self, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str]) -> None:
        """Take up what `save` wrote."""
        self.done, self.answers = int(notes["done"]), json.loads(notes["answers"])
        self.refused = json.loads(notes["refused"])
        self.parts = {name: [tensor] if len(tensor) else [] for name, tensor in tensors.items()}

    def turns(self, samples: Mapping[str, Samples], refused: Sequence[bool]) -> Turns:
        """All that was recorded."""
        cells, groups, flags = [], [], []
        for name, items in samples.items():
            pictured = set(items.pictured)
            cells += [Cell(name, kind, i in pictured) for i, kind in enumerate(items.kinds)]
            # A prompt without a group shares nothing with any other.
            groups += [labels or (f"{name} {i}",) for i, labels in enumerate(items.groups)]
            flags += refused if name == "malicious" else [False] * len(items)
        whole = {name: torch.cat(parts) for name, parts in self.parts.items()}
        return Turns(
            cells,
            groups,
            torch.tensor(flags),
            self.prompt_end,
            self.gate_site,
            whole["gate"],
            {site: whole[str(site)] for site in self.sites},
        )
