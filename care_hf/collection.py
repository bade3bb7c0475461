"""What was collected of prompts, in a file: the same prompts go on from it, and further ones are added to it."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from . import resume as files
from .samples import Samples
from .spans import Spans, from_plain, size, to_plain

FORMAT = "care_hf.collected.v1"


@dataclass(frozen=True)
class PromptFacts:
    """What is kept of the prompts of one class, in their order; with it a fit goes on without the prompts.

    Attributes:
        digests, kinds, groups: of every prompt, see `samples.Samples`.
        pictured: the indices of those with an image.
        known: the indices of those that count as refused whatever a judge says.
    """

    digests: list[str]
    kinds: list[str]
    groups: list[tuple[str, ...]]
    pictured: list[int]
    known: list[int]

    def __len__(self) -> int:
        return len(self.digests)

    @classmethod
    def of(cls, samples: Samples, known: int = 0) -> "PromptFacts":
        """Those of `samples`, of which the first `known` count as refused."""
        return cls(samples.digests, samples.kinds, samples.groups, samples.pictured, list(range(known)))

    @classmethod
    def read(cls, told: Mapping[str, list]) -> "PromptFacts":
        """From plain values, as JSON holds them.

        Raises:
            KeyError: one is missing.
        """
        plain = {one.name: told[one.name] for one in fields(cls)}
        return cls(**{**plain, "groups": [tuple(labels) for labels in plain["groups"]]})

    def __add__(self, later: "PromptFacts") -> "PromptFacts":
        return PromptFacts(
            self.digests + later.digests,
            self.kinds + later.kinds,
            self.groups + later.groups,
            self.pictured + [len(self) + i for i in later.pictured],
            self.known + [len(self) + i for i in later.known],
        )

    def known_first(self) -> list[int]:
        """The indices of all, those in `known` before the others: where a fit from scratch has them."""
        known = set(self.known)
        return sorted(range(len(self)), key=lambda i: i not in known)

    def take(self, order: Sequence[int]) -> "PromptFacts":
        """The prompts in another order."""
        pictured, known = set(self.pictured), set(self.known)
        return PromptFacts(
            [self.digests[i] for i in order],
            [self.kinds[i] for i in order],
            [self.groups[i] for i in order],
            [to for to, i in enumerate(order) if i in pictured],
            [to for to, i in enumerate(order) if i in known],
        )


@dataclass(eq=False)
class Collection:
    """What was collected so far, and of which prompts it will be.

    Attributes:
        work: what it depends on beside the prompts, see `describe`.
        prompts: of every class, those of an earlier collection first.
        earlier: how many of a class are of an earlier collection.
        done: which of a class are in `tensors`.
        tensors, notes: what was saved.
        path: where it is saved; None keeps nothing.
    """

    work: dict[str, Any]
    prompts: dict[str, PromptFacts]
    earlier: dict[str, int] = field(default_factory=dict)
    done: dict[str, Spans] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many prompts there are of every class."""
        return {name: len(facts) for name, facts in self.prompts.items()}

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on from."""
        return bool(self.notes or self.tensors)

    def batch(self, samples: Mapping[str, Samples], name: str, start: int, stop: int) -> list:
        """The prompts from `start` to `stop` of a class, of which `samples` holds those that are not earlier."""
        earlier = self.earlier.get(name, 0)
        return samples[name][start - earlier : stop - earlier]

    def save(self, tensors: Mapping[str, torch.Tensor], done: Mapping[str, Spans], **notes: str) -> None:
        """Write `tensors`, of the prompts `done` of every class, and `notes`, whole or not at all."""
        if self.path is None:
            return
        prompts = {name: asdict(facts) for name, facts in self.prompts.items()}
        told = {"work": self.work, "prompts": prompts, "done": {name: to_plain(ones) for name, ones in done.items()}}
        files.save(self.path, tensors, {name: json.dumps(value) for name, value in told.items()} | notes)

    @classmethod
    def load(cls, path: Path) -> "Collection":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        tensors, notes = files.load(path)
        try:
            work, prompts, done = (json.loads(notes.pop(name)) for name in ("work", "prompts", "done"))
            prompts = {name: PromptFacts.read(told) for name, told in prompts.items()}
            done = {name: from_plain(told) for name, told in done.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} holds no collection that this version of care_hf reads; delete it or name another file."
            ) from error
        return cls(work, prompts, {}, done, tensors, notes, path)


def describe(kind: str, model: PreTrainedModel, processor, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that a collection of a `kind` ("moments" or "turns") depends on beside its prompts, as plain values."""
    template = hashlib.sha256(str(getattr(processor, "chat_template", None)).encode()).hexdigest()
    told = {"format": FORMAT, "kind": kind, "model": files.model_fingerprint(model), "chat template": template}
    return json.loads(json.dumps({**told, **settings}))


def begin(
    work: dict[str, Any], given: Mapping[str, PromptFacts], resume: Path | None, update: Path | None
) -> Collection:
    """What to go on from: what `resume` holds of this very collection, else what `update` holds of earlier prompts.

    Args:
        work: see `describe`.
        given: the prompts of every class that has some.
        resume: where it is saved; it need not exist.
        update: a finished collection that the given prompts are added to; it is left as it is.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file `update`, or `resume` is a folder.
        ValueError: a file is of other work, a prompt is in two classes or in `update` already, or `update` is not
            finished.
    """
    check_disjoint(given)
    begun = Collection(work, dict(given))
    if update:
        begun = _earlier(work, update, given)
    begun.path = resume
    if not resume:
        return begun
    if update and resume.resolve() == update.resolve():
        raise ValueError(
            f"`resume` and `update` are both {resume}; name another file to keep the updated collection in, so that "
            "the earlier one stays whole."
        )
    if resume.is_dir():
        raise IsADirectoryError(f"resume={str(resume)!r} is a folder; name a file in it.")
    resume.parent.mkdir(parents=True, exist_ok=True)
    if resume.exists():
        found = Collection.load(resume)
        check_same(found, begun)
        found.earlier = begun.earlier
        return found
    return begun


def check_same(found: Collection, begun: Collection) -> None:
    """Assert that what was found in a file is of the same work and prompts as what is begun.

    Raises:
        ValueError: it is not.
    """
    _check_work(found.path, found, begun.work)
    if found.prompts != begun.prompts:
        raise ValueError(
            f"{found.path} holds another collection (other prompts: {_counted(found)} there, {_counted(begun)} here); "
            "delete it or name another file. To add prompts to it, pass it as `update=` with the new ones alone."
        )


def check_disjoint(prompts: Mapping[str, Samples | PromptFacts]) -> None:
    """Assert that every prompt belongs to one class only."""
    for first, second in combinations(prompts, 2):
        if set(prompts[first].digests) & set(prompts[second].digests):
            raise ValueError(f"A prompt is in both `{first}` and `{second}`; every prompt belongs to one class only.")


def _earlier(work: dict[str, Any], path: Path, given: Mapping[str, PromptFacts]) -> Collection:
    """The finished collection in `path`, the given prompts to be added."""
    if not path.is_file():
        raise FileNotFoundError(
            f"update={str(path)!r} does not exist; name a file that an earlier fit kept (`resume=`)."
        )
    earlier = Collection.load(path)
    _check_work(path, earlier, work)
    held, wanted = sum(map(size, earlier.done.values())), sum(earlier.counts.values())
    if held < wanted:
        raise ValueError(
            f"{path} is not finished: it holds {held} of {wanted} prompts. "
            "Run the fit that it is of again, with the same prompts and `resume=`, to finish it."
        )
    _check_new(path, earlier, given)
    counts, prompts = earlier.counts, dict(earlier.prompts)
    for name, facts in given.items():
        prompts[name] = prompts[name] + facts if name in prompts else facts
    return Collection(work, prompts, counts, earlier.done, earlier.tensors, earlier.notes)


def _check_work(path: Path, found: Collection, work: Mapping[str, Any]) -> None:
    told = found.work if isinstance(found.work, dict) else {}
    if told == work:
        return
    differing = []
    for name in dict.fromkeys([*work, *told]):
        theirs, ours = told.get(name), work.get(name)
        if theirs != ours:
            named = name in ("format", "model", "chat template")
            differing.append(f"another {name}" if named else f"{name}={theirs!r} there, {ours!r} here")
    raise ValueError(
        f"{path} holds another collection ({'; '.join(differing)}); fit with what it was collected with, or delete it "
        "or name another file."
    )


def _check_new(path: Path, earlier: Collection, given: Mapping[str, PromptFacts]) -> None:
    known = {digest: name for name, facts in earlier.prompts.items() for digest in facts.digests}
    again = Counter(
        (name, known[digest]) for name, facts in given.items() for digest in facts.digests if digest in known
    )
    if again:
        listed = ", ".join(f"{n} of `{name}` as `{there}`" for (name, there), n in again.items())
        total = sum(map(len, given.values()))
        raise ValueError(
            f"{sum(again.values())} of the {total} prompts given are in {path} already ({listed}); give only new ones."
        )


def _counted(collection: Collection) -> str:
    return " + ".join(f"{count} {name}" for name, count in collection.counts.items())
