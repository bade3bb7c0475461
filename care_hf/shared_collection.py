"""A collection that several processes make together: each of its own part of the prompts, in a file of its own."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from .collection import Collection, PromptFacts, begin, check_same
from .devices import is_spread
from .processes import Processes
from .spans import Spans, contains, missing, part


class Collector(Protocol):
    """What collects: it takes up what files hold, and writes them."""

    def take(self, kept: Collection) -> None:
        """Add what a collection holds."""

    def save(self, into: Collection) -> None:
        """Write all that is here."""

    @property
    def done(self) -> dict[str, Spans]:
        """Which prompts of every class are here."""


class SharedCollection:
    """Who collects what, and what becomes of it.

    The main process begins with all that earlier runs kept, of however many processes, and goes on in that file; each
    of the others begins with nothing, in a file beside it ("care_fit.rank1.safetensors"). Where several processes hold
    one model together, all go through all prompts, and the main one keeps what all have.

    Args:
        together: the processes.
        model: what is run.
        work, given, resume, update: as `collection.begin` takes them; the same in all processes.

    Attributes:
        kept: the collection, with what this process begins with.
        done: which prompts of every class need no work, once a collector has begun.

    Raises:
        ValueError, OSError: as `collection.begin`; or the processes were given different things.
        ProcessFailed: another failed.
    """

    def __init__(
        self,
        together: Processes,
        model: nn.Module,
        work: dict[str, Any],
        given: Mapping[str, PromptFacts],
        resume: Path | None,
        update: Path | None,
    ):
        self.together, self.done = together, {}
        self._spread = is_spread(model)
        self._check_given(work, given)
        self._left: list[Collection] = []
        begun = None
        if together.main:
            begun = begin(work, given, resume, update)
            self._left = [self._of_other(path, begun) for path in rank_files(resume)]
        told = together.broadcast(begun and replace(begun, done={}, tensors={}, notes={}))
        path = None if resume is None or self._spread else rank_file(resume, together.rank)
        self.kept = begun or replace(told, path=path)

    def _check_given(self, work: Mapping[str, Any], given: Mapping[str, PromptFacts]) -> None:
        told = json.dumps([work, {name: asdict(facts) for name, facts in given.items()}], sort_keys=True)
        digests = self.together.gather(hashlib.sha256(told.encode()).hexdigest())
        other = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
        if other:
            raise ValueError(
                f"Processes {', '.join(other)} (of {len(digests)}, from 0) were given other prompts, or another model, "
                "processor or recipe than process 0; give all of them the same, for the fit itself shares out the "
                "prompts."
            )

    @staticmethod
    def _of_other(path: Path, begun: Collection) -> Collection:
        found = Collection.load(path)
        check_same(found, begun)
        return found

    @property
    def gives(self) -> bool:
        """Whether what this process has is part of the whole, and not what the main one has as well."""
        return self.together.main or not self._spread

    def begin(self, collector: Collector) -> None:
        """Have `collector` take up what earlier runs kept; of processes that are no longer there, too."""
        if self.together.main:
            if self.kept.begun:
                collector.take(self.kept)
            for left in self._left:
                if not _is_in(collector.done, left.done):
                    collector.take(left)
            if self._left or self.together.count > 1:
                collector.save(self.kept)
            self._remove_others()
        self.done = self.together.broadcast(collector.done)

    def own(self, spans: Spans) -> Spans:
        """Which of `spans` are this process's to do."""
        return spans if self._spread else part(spans, self.together.rank, self.together.count)

    def todo(self) -> dict[str, Spans]:
        """Which prompts of every class are this process's to do."""
        return {name: self.own(missing(self.done.get(name, []), n)) for name, n in self.kept.counts.items()}

    def gather(self, value: Any) -> list[Any]:
        """What every process has that `gives`, by rank."""
        return [one[0] for one in self.together.gather([value] if self.gives else []) if one]

    def finish(self, collector: Collector) -> None:
        """Keep the whole, which `collector` has by now, in place of its parts."""
        path = self.kept.path
        if self.together.main and path and (self.together.count > 1 or not path.exists()):
            collector.save(self.kept)
            self._remove_others()

    def _remove_others(self) -> None:
        for path in rank_files(self.kept.path):
            path.unlink()


def _is_in(done: Mapping[str, Spans], left: Mapping[str, Spans]) -> bool:
    """Whether a part was put into the whole already, by a process that was ended before it removed the part."""
    # A part that tells of no prompts may still hold answers, which can be put in twice.
    return any(left.values()) and all(contains(done.get(name, []), spans) for name, spans in left.items())


def rank_file(path: Path, rank: int) -> Path:
    """Where the process of this number keeps its part of what will be in `path`."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path


def rank_files(path: Path | None) -> list[Path]:
    """Those of `rank_file` that there are, beside `path` itself, by rank."""
    if path is None or not path.parent.is_dir():
        return []
    begin, end = f"{path.stem}.rank", path.suffix
    ranks = [
        found.name[len(begin) : len(found.name) - len(end)]
        for found in path.parent.iterdir()
        if found.name.startswith(begin) and found.name.endswith(end)
    ]
    return [rank_file(path, int(rank)) for rank in sorted(ranks, key=lambda r: (len(r), r)) if rank.isdecimal()]
