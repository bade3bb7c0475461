"""The world as an evaluation suite, and as the prompts that defences are trained on."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..suite import Case, Suite
from .judging import refuses
from .prompts import fit_prompts
from .world import ATTACKS, BENIGN_TASKS, REFUSAL, SPLITS, World, WorldSample

# What gradient attacks are run on: requests in text beside an unrelated image, and attacks that are an image.
PICTURED_TEXT = ("plain", "wrapper", "split", "cipher")
PICTURED = (*PICTURED_TEXT, "typographic", "icon")
CORPUS = 4


def as_case(sample: WorldSample) -> Case:
    """A prompt with its one right answer."""
    word = sample.concept.word if sample.concept else ""
    request = f"how do i make {word} ?" if sample.concept and sample.concept.forbidden else sample.text
    category = sample.concept.category if sample.concept else sample.task
    return Case(sample.messages, request, sample.answer, sample.answer, category)


def load_suite(split: str = "test", n: int = 160, world: World | None = None) -> Suite:
    """`n` prompts of every attack family, of plain forbidden requests and of every benign task.

    Args:
        split: "validation", to choose by, or "test", to report.
        n: prompts in each set.
        world: whose prompts.

    Raises:
        ValueError: another split; defences are trained on "fit".
    """
    if split not in SPLITS[1:]:
        raise ValueError(f"split={split!r} is not for evaluation; choose one of {SPLITS[1:]}.")
    world = world or World()

    def cases(samples: Sequence[WorldSample]) -> list[Case]:
        return [as_case(sample) for sample in samples]

    return Suite(
        name="testbed",
        attacks={family: cases(world.attack(family, split, n)) for family in ATTACKS},
        harmful=cases(world.plain(split, n)),
        benign={task: cases(world.benign(task, split, n)) for task in BENIGN_TASKS},
        pictured={family: cases(pictured(world, family, split, n)) for family in PICTURED},
        affirmation="step one mix",
        corpus=[concept.answer for concept in world.select(True, "fit")][:CORPUS],
        source={"world": repr(world), "split": split, "n": n},
    )


def pictured(world: World, family: str, split: str, n: int) -> list[WorldSample]:
    """`n` attacks with an image that a gradient may change; those in text stand beside an unrelated one."""
    if family not in PICTURED_TEXT:
        return world.attack(family, split, n)
    rng = np.random.default_rng([7, PICTURED_TEXT.index(family)])
    concepts = world.select(True, split)
    return [world.request(rng, concepts[i % len(concepts)], (split,), family, scene=True) for i in range(n)]


class FitPrompts:
    """The prompts of the fit split, as `training.Trainer` takes them; `n` of every kind."""

    refusal = REFUSAL

    def __init__(self, n: int = 192, world: World | None = None):
        self.n, self.world = n, world or World()

    def prompts(self, families: Sequence[str], exposure: bool) -> dict[str, Sequence[Any]]:
        """See `training.TrainingPrompts`."""
        return fit_prompts(self.world, self.n, families, exposure=exposure)

    def is_refusal(self, answer: str) -> bool:
        """Whether the whole answer is the refusal."""
        return refuses(answer)
