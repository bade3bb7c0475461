"""A comparison in a file: which defences, how each is trained, and how much is measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .budget import Budget
from .evaluation import evaluate
from .judges import Judge
from .report import Report
from .settings_files import check_fields, check_mapping, find_file, made, read_fields
from .suite import Suite
from .training import Specification, Trainer, TrainingPrompts


@dataclass(frozen=True)
class Comparison:
    """What `configs/evaluation/*.yaml` holds."""

    defences: Mapping[str, Specification]
    budget: Budget

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        """Read a YAML file, or the one of that name in ``configs/evaluation``: "main".

        Raises:
            ValueError: there is no such file, a field is not known, or a value does not fit; the defence is named.
        """
        path = find_file(path, "Comparison", "evaluation")
        values = read_fields(path)
        check_fields(values, ("defences", "budget", "families"), str(path), ("defences",))
        check_mapping(values["defences"], f"{path}: defences")
        specifications = {
            name: made(Specification, given, f"{path}: {name!r}") for name, given in values["defences"].items()
        }
        if not specifications:
            raise ValueError(f"{path}: defences is empty; name at least one.")
        return cls(specifications, made(Budget, values.get("budget") or {}, f"{path}: budget"))


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
