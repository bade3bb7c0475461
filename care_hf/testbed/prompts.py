"""The world's prompts in the form that `care_hf.fit` takes them."""

from collections.abc import Iterable
from typing import Any

from .world import EXPOSURES, FORMS, VISUAL_QUESTIONS, World, WorldSample

REQUESTS = ("recipe", *FORMS[1:], "typographic", "icon")  # the benign tasks that ask for what could be refused
KIND_OF = {
    "wrapper+image": "wrapper",
    "new font": "typographic",
}  # attacks that differ from a benign task by nothing else


def as_prompt(sample: WorldSample, kind: str) -> dict[str, Any]:
    """A dict of messages and labels; prompts about one concept are held out together."""
    groups = () if sample.concept is None else (sample.concept.word,)
    return {"messages": sample.messages, "kind": kind, "groups": groups}


def fit_prompts(
    world: World, n: int, families: Iterable[str] = (), split: str = "fit", exposure: bool = True
) -> dict[str, list[dict[str, Any]]]:
    """`n` prompts of every kind, by the argument of `care_hf.fit` that takes them.

    Args:
        world: whose prompts.
        n: how many of each kind.
        families: attack families that are among the malicious prompts beside plain requests.
        split: which concepts and templates.
        exposure: whether to add exposed and neutral prompts; without, the neutral ones are benign.
    """
    prompts = {
        "benign": [as_prompt(s, task) for task in REQUESTS for s in world.benign(task, split, n)],
        "malicious": [as_prompt(s, "recipe") for s in world.plain(split, n)],
    }
    for family in families:
        prompts["malicious"] += [as_prompt(s, KIND_OF.get(family, family)) for s in world.attack(family, split, n)]
    neutral = [as_prompt(s, task) for task in VISUAL_QUESTIONS for s in world.benign(task, split, n)]
    neutral += [as_prompt(s, form) for form in EXPOSURES for s in world.exposure(form, False, split, n)]
    if not exposure:
        prompts["benign"] += neutral
        return prompts
    exposed = [as_prompt(s, form) for form in EXPOSURES for s in world.exposure(form, True, split, n)]
    return prompts | {"exposed": exposed, "neutral": neutral}
