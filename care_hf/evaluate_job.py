"""What `care evaluate` does, from names and files to a report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .comparison import Comparison, compare
from .fitting import load_processor
from .judges import Judge, StrictJudge, WordJudge
from .loaders import load_suite
from .model_judges import load_judge
from .prompt_files import PromptSets
from .report import Report
from .suite import Suite
from .testbed import load_testbed
from .testbed.suite import FitPrompts
from .testbed.suite import load_suite as load_world
from .testbed.world import REFUSAL, SPLITS


@dataclass(frozen=True, eq=False)
class Plan:
    """All that a comparison needs, loaded and checked."""

    model: Any
    processor: Any
    suite: Suite
    prompts: Any
    comparison: Comparison
    judges: list[Judge]
    seed: int

    @property
    def summary(self) -> str:
        """What will be done, in a line."""
        count = sum(map(len, self.suite.sets.values()))
        return f"{len(self.comparison.defences)} defences on {count} prompts of {self.suite.name}"

    def run(self, out: Path) -> Report:
        """Do it, and write the report into `out`."""
        report = compare(
            self.model,
            self.processor,
            self.suite,
            self.prompts,
            self.comparison,
            judge=self.judges,
            seed=self.seed,
            out=out / "cells",
        )
        report.save(out)
        return report


def prepare(
    comparison: Path,
    model: str,
    suite: Sequence[str],
    prompts: Path | None,
    judges: Sequence[Path],
    seed: int,
    split: str,
    quick: bool,
) -> Plan:
    """Load everything.

    Raises:
        ValueError, OSError: a file, a name or a value does not fit; the message says which.
    """
    plan = Comparison.load(comparison)
    plan = replace(plan, budget=plan.budget.quick()) if quick else plan
    further = [load_judge(path) for path in judges]
    if model:
        if not suite or prompts is None:
            raise ValueError(f"For the model {model!r} give --suite, what is asked, and --prompts, what to train on.")
        from transformers import AutoModelForImageTextToText

        asked, data = load_suite(suite, plan.budget.cases), PromptSets.load(prompts)
        loaded = AutoModelForImageTextToText.from_pretrained(model, dtype="auto", device_map="auto").eval()
        return Plan(loaded, load_processor(loaded), asked, data, plan, [WordJudge(), *further], seed)
    if split not in SPLITS[1:]:
        raise ValueError(f"split={split!r} must be one of {SPLITS[1:]}: defences are trained on the other.")
    loaded, processor = load_testbed(seed)
    asked = load_world(split, plan.budget.cases)
    return Plan(loaded, processor, asked, FitPrompts(), plan, [StrictJudge(REFUSAL), *further], seed)
