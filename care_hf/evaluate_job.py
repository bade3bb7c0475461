"""What `care evaluate` does, from names and files to a report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .budget import Budget
from .comparison import Comparison, compare
from .configuration_care import CareConfig
from .defences import CannedRefusal
from .evaluation import evaluate
from .judges import Judge, StrictJudge, WordJudge
from .loaders import LazyCases, load_suite
from .model_judges import load_judge
from .opening import check_source, open_model
from .patches import with_image
from .prompt_files import PromptSets
from .report import Report
from .samples import Sample
from .subspace import SafetySubspaces
from .suite import Case, Suite
from .testbed import load_testbed
from .testbed.suite import FitPrompts
from .testbed.suite import load_suite as load_world
from .testbed.world import REFUSAL, SPLITS

QUICK_PROMPTS = 48  # of each kind, to train on
TESTBED = "testbed"  # as the name of a suite, for repaired copies of it
CONTROL = "gate + canned refusal"


@dataclass(frozen=True, eq=False)
class Plan:
    """All that a comparison needs, loaded and checked.

    Attributes:
        model: to be defended, or repaired already.
        processor: its processor.
        suite: what is asked.
        judges: tell refusals from harm.
        budget: how much is measured.
        seed: of what is drawn.
        comparison: which defences are trained; None to measure a repaired model as it is.
        prompts: what they are trained on.
    """

    model: Any
    processor: Any
    suite: Suite
    judges: list[Judge]
    budget: Budget
    seed: int
    comparison: Comparison | None = None
    prompts: Any = None

    @property
    def summary(self) -> str:
        """What will be done, in a line."""
        count = sum(len(cases[: self.budget.cases]) for cases in self.suite.sets.values())
        what = (
            f"{len(self.comparison.defences)} defences" if self.comparison else "the repair, and the model without it,"
        )
        return f"{what} on {count} prompts of {self.suite.name}"

    def run(self, out: Path) -> Report:
        """Do it, and write the report into `out`."""
        cells = out / "cells"
        if self.comparison:
            comparison = replace(self.comparison, budget=self.budget)
            asked = (self.model, self.processor, self.suite, self.prompts, comparison)
            report = compare(*asked, judge=self.judges, seed=self.seed, out=cells)
        else:
            defences = _controls(self.model, self.judges)
            options = {"processor": self.processor, "out": cells}
            report = evaluate(self.model, self.suite, defences, self.judges, self.budget, self.seed, **options)
        report.save(out)
        return report


def summary(report: Report) -> dict[str, str]:
    """By defence the shares of attacks and of plain harmful requests that succeed, and benign prompts refused."""

    def told(name: str) -> str:
        asked = {"attacks": ("attack/", "complied"), "plain": ("harmful", "complied"), "benign": ("benign/", "refused")}
        rates = {label: report.rate(name, *of) for label, of in asked.items()}
        words = {"attacks": "of {n} attacks succeed", "plain": "of {n} plain ones", "benign": "of {n} benign refused"}
        return ", ".join(f"{r.percent} % {words[label].format(n=r.n)}" for label, r in rates.items() if r.n)

    return {name: told(name) for name in report.results}


def _controls(repaired, judges: Sequence[Judge]) -> dict[str, CannedRefusal]:
    """The control that takes no training: the same gate, with a refusal in words for an answer."""
    if repaired.gate is None or not len(repaired.gate.thresholds):
        return {}
    words = REFUSAL if isinstance(judges[0], StrictJudge) else PromptSets.refusal
    return {CONTROL: CannedRefusal(SafetySubspaces.from_model(repaired), words)}


def prepare(
    model: str,
    suite: Sequence[str],
    comparison: Path | None,
    prompts: Path | None,
    judges: Sequence[Path],
    seed: int,
    split: str,
    quick: bool,
    device: str = "auto",
    dtype: str = "auto",
) -> Plan:
    """Load everything; `device` and `dtype` as `opening.open_model` takes them.

    Raises:
        ValueError, OSError: a file, a name or a value does not fit; the message says which.
    """
    plan = Comparison.load(comparison) if comparison else None
    budget = plan.budget if plan else Budget(gradient_cases=0)
    budget = budget.quick() if quick else budget
    further = [load_judge(path) for path in judges]
    if not model:
        if plan is None:
            raise ValueError("The testbed is measured under a --comparison, such as configs/evaluation/main.yaml.")
        trained_on = FitPrompts(QUICK_PROMPTS) if quick else FitPrompts()
        world = _world(split, budget)
        return Plan(*load_testbed(seed), world, [StrictJudge(REFUSAL), *further], budget, seed, plan, trained_on)
    check_source(model)
    if not suite or (plan and prompts is None):
        raise ValueError(
            f"For the model {model!r} give --suite, what is asked"
            + (", and --prompts, what the defences are trained on." if plan else ".")
        )
    if plan is None and not isinstance(AutoConfig.from_pretrained(model), CareConfig):
        raise ValueError(f"{model!r} is not repaired, so there is nothing to compare; give a --comparison.")
    data = PromptSets.load(prompts) if prompts and plan else None
    own = list(suite) == [TESTBED]
    asked = _world(split, budget) if own else load_suite(suite, budget.cases)
    first = StrictJudge(REFUSAL) if own else WordJudge()
    opened = open_model(model, device, dtype, repaired=plan is None)
    if budget.gradient_cases and not own:
        asked = replace(asked, pictured=pictured(asked, opened.processor))
    return Plan(opened.model, opened.processor, asked, [first, *further], budget, seed, plan, data)


def _world(split: str, budget: Budget) -> Suite:
    if split not in SPLITS[1:]:
        raise ValueError(f"split={split!r} must be one of {SPLITS[1:]}: defences are trained on the other.")
    return load_world(split, budget.cases)


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
