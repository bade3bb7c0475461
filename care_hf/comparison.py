"""A comparison in a file: which defences, how each is trained, and how much is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from .budget import Budget
from .evaluation import evaluate
from .judges import Judge
from .report import Report
from .suite import Suite
from .training import Specification, Trainer, TrainingPrompts


@dataclass(frozen=True)
class Comparison:
    """What `configs/evaluation/*.yaml` holds."""

    defences: Mapping[str, Specification]
    budget: Budget

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        """Read a YAML file.

        Raises:
            ValueError: a field is not known, or a value does not fit; the defence is named.
        """
        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        _check_fields(values, str(path))
        unknown = sorted(set(values) - {"defences", "budget", "families"})
        if unknown or not values.get("defences"):
            raise ValueError(f"{path}: needs 'defences', and may have 'budget' and 'families', but not {unknown}.")
        _check_fields(values["defences"], f"{path}: defences")
        specifications = {
            name: _made(Specification, given, f"{path}: {name!r}") for name, given in values["defences"].items()
        }
        return cls(specifications, _made(Budget, values.get("budget") or {}, f"{path}: budget"))


def _check_fields(given: Any, where: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} holds {given!r:.60}; it needs fields, `name: value`.")


def _made(cls: type, given: Mapping[str, Any], where: str) -> Any:
    _check_fields(given, where)
    unknown = sorted(set(given) - {field.name for field in fields(cls)})
    if unknown:
        raise ValueError(f"{where} has the fields {unknown}; known are {[field.name for field in fields(cls)]}.")
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


class _Due:
    """A defence that is trained when it is called; `settings` tells its cells apart before."""

    def __init__(self, trainer: Trainer, specification: Specification):
        prompts = trainer.prompts_digest(specification)
        self.settings = {**specification.settings, "seed": trainer.seed, "prompts": prompts}
        self._train = partial(trainer.train, specification)

    def __call__(self):
        return self._train()


def compare(
    model,
    processor,
    suite: Suite,
    data: TrainingPrompts,
    comparison: Comparison,
    *,
    judge: Judge | list[Judge] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
) -> Report:
    """Train every defence on `data` and measure it on `suite`; arguments as in `evaluation.evaluate`."""
    trainer = Trainer(model, processor, data, comparison.budget.batch_size, seed)
    due = {name: _Due(trainer, specification) for name, specification in comparison.defences.items()}
    adaptive = [name for name, specification in comparison.defences.items() if specification.adaptive]
    return evaluate(model, suite, due, judge, comparison.budget, seed, processor=processor, adaptive=adaptive, out=out)
