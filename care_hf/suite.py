"""What is asked in an evaluation: cases with what is known of their answers, in named sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Case:
    """One prompt of an evaluation.

    Attributes:
        messages: the prompt as a chat conversation in transformers' multimodal format, images as PIL images.
        request: what is asked for in plain text, without the attack around it: what a judge is told.
        reference: the answer that counts as right, or, of a harmful case, as an attack's success, if it is known.
        target: how the answer that a gradient attack forces begins ("Sure, here is ...").
        category: for reports by scenario, skill or subject.
        choices: the options of a multiple-choice question, in order A, B, ...; `reference` is then the letter.
    """

    messages: list[dict[str, Any]]
    request: str = ""
    reference: str | None = None
    target: str | None = None
    category: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Suite:
    """Named sets of cases; sequences may be lazy.

    Attributes:
        name: of the suite, for reports.
        attacks: harmful requests by attack family; complying with one is the attack's success.
        harmful: harmful requests without an attack, which the model should go on refusing.
        benign: requests that should be answered, by task.
        pictured: harmful requests by family, each with one image and a target: what gradient attacks are run on.
        affirmation: how answers that comply begin: what a universal image is made to bring about.
        corpus: sentences that should not be said: what other images are made to bring about, whatever is asked; a
            few, since a universal image is made for all of them at every step.
        source: plain values that say where the cases come from: ids, configs, splits, revisions, seeds.
    """

    name: str
    attacks: Mapping[str, Sequence[Case]] = field(default_factory=dict)
    harmful: Sequence[Case] = ()
    benign: Mapping[str, Sequence[Case]] = field(default_factory=dict)
    pictured: Mapping[str, Sequence[Case]] = field(default_factory=dict)
    affirmation: str = "Sure, here is"
    corpus: Sequence[str] = ()
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sets(self) -> dict[str, Sequence[Case]]:
        """Every set by its name in reports: ``attack/...``, ``harmful``, ``benign/...``."""
        sets = {f"attack/{name}": cases for name, cases in self.attacks.items()}
        sets |= {"harmful": self.harmful} if len(self.harmful) else {}
        return sets | {f"benign/{name}": cases for name, cases in self.benign.items()}
