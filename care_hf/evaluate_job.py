"""What `care evaluate` does, from names and files to a report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .comparison import Comparison, compare
from .fitting import load_processor
from .judges import Judge, StrictJudge, WordJudge
from .loaders import LazyCases, load_suite
from .model_judges import load_judge
from .patches import with_image
from .prompt_files import PromptSets
from .report import Report
from .samples import Sample
from .suite import Case, Suite
from .testbed import load_testbed
from .testbed.suite import FitPrompts
from .testbed.suite import load_suite as load_world
from .testbed.world import REFUSAL, SPLITS

QUICK_PROMPTS = 48  # of each kind, to train on


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
        count = sum(len(cases[: self.comparison.budget.cases]) for cases in self.suite.sets.values())
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
        processor = load_processor(loaded)
        if plan.budget.gradient_cases:
            asked = replace(asked, pictured=pictured(asked, processor))
        return Plan(loaded, processor, asked, data, plan, [WordJudge(), *further], seed)
    if split not in SPLITS[1:]:
        raise ValueError(f"split={split!r} must be one of {SPLITS[1:]}: defences are trained on the other.")
    loaded, processor = load_testbed(seed)
    asked = load_world(split, plan.budget.cases)
    trained_on = FitPrompts(QUICK_PROMPTS) if quick else FitPrompts()
    return Plan(loaded, processor, asked, trained_on, plan, [StrictJudge(REFUSAL), *further], seed)


def pictured(suite: Suite, processor) -> dict[str, LazyCases]:
    """The attacks of a suite that have one image, of the size that the model takes, for gradients to change.

    An attacker may give an image of any size; of this one, every pixel is seen. Forced is the case's own target, or how
    answers that comply begin.

    Raises:
        ValueError: the image processor names no one size.
    """
    does = processor.image_processor
    # A size by its shortest edge is the crop's where there is a crop.
    named = getattr(does, "crop_size", None) or getattr(does, "size", None) or {}
    width, height = named.get("width"), named.get("height")
    if not width or not height:
        raise ValueError(
            f"{type(does).__name__} takes images of no one size ({named}), and gradient attacks need one; set "
            "`gradient_cases: 0` in the comparison's budget."
        )

    def sized(case: Case) -> Case:
        sample = Sample(case.messages)
        image = sample.images[0].convert("RGB").resize((width, height))
        return replace(case, messages=with_image(sample, image).messages, target=case.target or suite.affirmation)

    one_image = {
        name: cases
        for name, cases in suite.attacks.items()
        if len(cases) and len(Sample(cases[0].messages).images) == 1
    }
    return {name: LazyCases(cases, sized, name) for name, cases in one_image.items()}
