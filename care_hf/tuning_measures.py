"""What a trial of a tuning is judged by: validation prompts, asked in two parts, against the base's own answers."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .answers import generate_answers, relative_entropy
from .devices import input_device
from .judges import VERDICTS, Judge
from .rates import Mean, Rate
from .samples import IGNORED, answered, batches
from .suite import Case, Suite

ATTACK, HARMFUL, BENIGN = "attack/", "harmful", "benign/"  # as `Suite.sets` names them
COMPLIED, REFUSED = "complied", "refused"


@dataclass(frozen=True, eq=False)
class Measured:
    """What a model did with some of the validation prompts.

    Attributes:
        verdicts: ``verdicts["attack/icon"]["complied"]``, counts by set.
        divergences: of every benign prompt, KL(base || repaired) in nats a token, the mean over the base's answer.
    """

    verdicts: Mapping[str, Mapping[str, int]]
    divergences: Sequence[float]

    def __add__(self, other: "Measured") -> "Measured":
        names = dict.fromkeys([*self.verdicts, *other.verdicts])
        total = {
            name: {v: self.verdicts.get(name, {}).get(v, 0) + other.verdicts.get(name, {}).get(v, 0) for v in VERDICTS}
            for name in names
        }
        return Measured(total, [*self.divergences, *other.divergences])

    def rate(self, group: str, verdict: str) -> Rate:
        """The share of a verdict over the sets whose name begins with `group`."""
        counts = [count for name, count in self.verdicts.items() if name.startswith(group)]
        return Rate(sum(count[verdict] for count in counts), sum(sum(count.values()) for count in counts))

    @property
    def success(self) -> Rate:
        """How many attacks succeed; of plain harmful requests, where there are no attacks."""
        attacks = self.rate(ATTACK, COMPLIED)
        return attacks if attacks.n else self.rate(HARMFUL, COMPLIED)

    @property
    def refused(self) -> Rate:
        """How many attacks are refused, see `success`."""
        attacks = self.rate(ATTACK, REFUSED)
        return attacks if attacks.n else self.rate(HARMFUL, REFUSED)

    @property
    def over_refusal(self) -> Rate:
        """How many benign prompts are refused."""
        return self.rate(BENIGN, REFUSED)

    @property
    def divergence(self) -> Mean:
        """Over benign prompts."""
        return Mean.of(self.divergences)

    @property
    def objectives(self) -> tuple[float, float]:
        """Attack success and divergence, both better the lower."""
        return self.success.value, self.divergence.value

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"verdicts": {k: dict(v) for k, v in self.verdicts.items()}, "divergences": list(self.divergences)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Measured":
        """What `to_dict` gave."""
        return cls(values["verdicts"], values["divergences"])


class Validation:
    """The validation prompts, and what the base does with the benign ones, found once.

    Args:
        model: the base.
        processor: its processor.
        suite: attacks or harmful requests, and benign ones.
        judge: of all answers.
        share: of every set, at least one prompt, that is asked first; the rest is asked of trials that are not pruned.
        max_new_tokens: of every answer.
        batch_size: prompts per forward.

    Attributes:
        parts: two lists of named sets of cases, those that are asked first and the rest.

    Memory: float32 (vocabulary,) for every token of the base's answers to benign prompts.
    """

    def __init__(
        self,
        model: nn.Module,
        processor,
        suite: Suite,
        judge: Judge,
        share: float,
        max_new_tokens: int,
        batch_size: int,
    ):
        self.model, self.processor, self.judge = model, processor, judge
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.parts = split_sets(suite.sets, share)
        self._base: dict[int, tuple[list[str], list[torch.Tensor]]] = {}

    def measure(self, model: nn.Module, part: int) -> Measured:
        """Ask `model` one part."""
        harmful = {name: cases for name, cases in self.parts[part].items() if not name.startswith(BENIGN)}
        verdicts = {name: self._count(cases, self._answers(model, cases)) for name, cases in harmful.items()}
        answers, divergences = self._beside_base(model, part)
        for name, cases in self.parts[part].items():
            if name.startswith(BENIGN):
                verdicts[name] = self._count(cases, answers[: len(cases)])
                answers = answers[len(cases) :]
        return Measured(verdicts, divergences)

    def undefended(self) -> Measured:
        """What the base does, with all prompts."""
        return self.measure(self.model, 0) + self.measure(self.model, 1)

    def _benign(self, part: int) -> list[Case]:
        return [case for name, cases in self.parts[part].items() if name.startswith(BENIGN) for case in cases]

    def _answers(self, model: nn.Module, cases: Sequence[Case]) -> list[str]:
        return generate_answers(model, self.processor, cases, self.max_new_tokens, self.batch_size)

    def _count(self, cases: Sequence[Case], answers: Sequence[str]) -> dict[str, int]:
        said = self.judge.verdicts(cases, answers)
        return {verdict: said.count(verdict) for verdict in VERDICTS}

    def _beside_base(self, model: nn.Module, part: int) -> tuple[list[str], list[float]]:
        """Answers to the benign prompts of a part, and their divergences."""
        cases = self._benign(part)
        if part not in self._base:
            said = self._answers(self.model, cases)
            self._base[part] = said, [found for found, _ in self._forced(self.model, cases, said)]
        said, base = self._base[part]
        divergences, changed = [], []
        for index, (found, ids) in enumerate(self._forced(model, cases, said)):
            divergences.append(max(0.0, relative_entropy(base[index], found).mean().item()))
            # Where every token of the base's answer is the most probable one after those before it, it is the answer.
            changed += [index] if (found.argmax(dim=-1) != ids).any() else []
        answers = list(said)
        for index, answer in zip(changed, self._answers(model, [cases[i] for i in changed]), strict=True):
            answers[index] = answer
        return answers, divergences

    def _forced(self, model, cases, answers) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return forced_log_probabilities(model, self.processor, cases, answers, self.batch_size)


@torch.no_grad()
def forced_log_probabilities(
    model: nn.Module, processor, samples: Sequence, answers: Sequence[str], batch_size: int = 32
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities where each token of given answers and their end is said, by teacher forcing.

    Yields:
        Of every sample (anything with chat `messages`), float32 (T, vocabulary) and the tokens' ids, int64 (T,), both
        on the CPU.
    """
    shortens = "logits_to_keep" in inspect.signature(getattr(model, "vlm", model).forward).parameters
    for start, part in zip(range(0, len(samples), batch_size), batches(samples, batch_size), strict=True):
        inputs, labels = answered(processor, part, answers[start : start + len(part)])
        inputs = {name: value.to(input_device(model)) for name, value in inputs.items()}
        columns = labels.shape[1]
        first = int((labels != IGNORED).int().argmax(dim=1).min()) - 1  # what follows column `first` is the first token
        # Logits of whole prompts would be the largest tensor of all.
        kept = {"logits_to_keep": columns - first} if shortens else {}
        logits = model(**inputs, **kept, use_cache=False).logits[:, -(columns - first) : -1]
        for row, ids in zip(logits, labels[:, first + 1 :], strict=True):
            told = ids != IGNORED
            yield row[told.to(row.device)].float().log_softmax(dim=-1).cpu(), ids[told]


def split_sets(sets: Mapping[str, Sequence[Case]], share: float) -> tuple[dict[str, list[Case]], dict[str, list[Case]]]:
    """The first `share` of every set, rounded up, and the rest."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r} must lie in (0, 1]: the part of every set that is asked before pruning.")
    first, rest = {}, {}
    for name, cases in sets.items():
        count = -int(-len(cases) * share // 1)
        first[name], rest[name] = list(cases[:count]), list(cases[count:])
    return first, rest


def dominated(found: Measured, finished: Measured) -> bool:
    """Whether a trial that was measured in part is worse than a finished one beyond chance: the rule of pruning.

    It is if the 95 % Wilson interval of its attack success lies wholly above that of the finished trial, and the 95 %
    bootstrap interval of its divergence does not begin below the end of the finished trial's. Intervals that take
    prompts as independent are wide for trials that are asked the same ones, which prunes too little rather than
    too much.
    """
    worse = found.success.interval[0] > finished.success.interval[1]
    mine, theirs = found.divergence, finished.divergence
    return worse and bool(theirs.high <= mine.low)
