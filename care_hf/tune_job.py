"""What `care tune` does, from names and files to a report and a repair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .batching import first_size
from .judges import Judge, StrictJudge, WordJudge
from .loaders import load_suite
from .opening import open_model
from .prompt_files import PromptSets
from .recipe import RECIPES
from .search_space import Space
from .search_values import FAMILIES, MODALITY_FAMILY, TURN_FAMILY
from .suite import Suite
from .testbed import load_testbed
from .testbed.suite import FitPrompts
from .testbed.suite import load_suite as load_world
from .testbed.world import ATTACKS, REFUSAL
from .tuned import Tuned, told_recipe
from .tuning import STARTS, tune
from .tuning_choice import Rule
from .tuning_study import load_optuna

SEEN = ("split", "typographic", "icon")  # the testbed's attacks that repairs are fitted on; all are validated on
FIT_PROMPTS = 96  # of each kind, of the testbed


@dataclass(frozen=True, eq=False)
class Plan:
    """All that a tuning needs, loaded and checked."""

    model: Any
    processor: Any
    prompts: Mapping[str, Sequence[Any]]
    suite: Suite
    judge: Judge
    space: Space
    rule: Rule
    options: dict[str, Any]

    @property
    def summary(self) -> str:
        """What will be done, in a line."""
        asked, fitted = (sum(map(len, sets.values())) for sets in (self.suite.sets, self.prompts))
        families = " and ".join(f"by {family}" for family in self.space.families)
        return (
            f"{self.options['trials']} trials of repairs {families} at layers {list(self.space.layers)}, fitted on "
            f"{fitted} prompts, chosen on {asked} of {self.suite.name}"
        )

    def run(self, out: Path) -> Tuned:
        """Do it, keep the study in `out`, and write the report there."""
        found = tune(
            self.model,
            validation=self.suite,
            processor=self.processor,
            judge=self.judge,
            space=self.space,
            rule=self.rule,
            out=out,
            **self.prompts,
            **self.options,
        )
        found.save(out)
        return found


def prepare(
    model: str,
    suite: Sequence[str],
    prompts: Path | None,
    seed: int,
    n: int,
    trials: int,
    sampler: str = "tpe",
    families: Sequence[str] = FAMILIES,
    layers: Sequence[int] = (),
    max_divergence: float | None = Rule.divergence,
    max_over_refusal: float | None = Rule.over_refusal,
    max_new_tokens: int = 32,
    batch_size: int | str = 16,
    attacks: Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    min_refusal: float | None = Rule.refusal,
) -> Plan:
    """Load everything.

    Args:
        model: Hub id or folder; empty for the bundled testbed, which is fitted on its split "fit" and validated on
            "validation", its test split being left for the report.
        suite: data sets to choose by, as `care evaluate` takes them: attacks or harmful requests, and benign ones.
        prompts: what repairs are fitted on, see `PromptSets`.
        seed: of the sampler; of the testbed, which checkpoint.
        n: validation prompts of every set, at most.
        trials: how many recipes are tried.
        sampler: "tpe" or "random".
        families: of recipes, see `search_space.Space`.
        layers: that may be repaired, from 0; by default see `Space.of`.
        max_divergence: the limit of `Rule.divergence`.
        max_over_refusal: the limit of `Rule.over_refusal`.
        max_new_tokens: of every answer.
        batch_size: prompts per forward, or "auto".
        attacks: families of attacks that are fitted on beside plain requests; by default `SEEN` of the testbed, all of
            a file.
        device: as `opening.open_model` takes it.
        dtype: likewise.
        min_refusal: the limit of `Rule.refusal`.

    Raises:
        ImportError: optuna is not installed.
        ValueError, OSError: a file, a name or a value does not fit; the message says which.
    """
    load_optuna()
    rule = Rule(max_divergence, max_over_refusal, min_refusal)
    options = {"trials": trials, "sampler": sampler, "seed": seed}
    if not model:
        if suite or prompts:
            raise ValueError("--suite and --prompts are for a model that is named; the testbed has prompts of its own.")
        chosen = SEEN if attacks is None else tuple(attacks)
        if set(chosen) - set(ATTACKS):
            raise ValueError(f"attacks={chosen!r} must be of {ATTACKS}.")
        loaded, processor = load_testbed(seed)
        data, asked, judge = FitPrompts(FIT_PROMPTS), load_world("validation", n), StrictJudge(REFUSAL)
    else:
        if not suite or prompts is None:
            raise ValueError(f"For the model {model!r} give --suite, what to choose by, and --prompts, what to fit on.")
        asked, data, judge = load_suite(suite, n), PromptSets.load(prompts), WordJudge()
        chosen = tuple(data.attacks) if attacks is None else tuple(attacks)
        opened = open_model(model, device, dtype, repaired=False)
        loaded, processor = opened.model, opened.processor
    options |= {"max_new_tokens": max_new_tokens, "batch_size": first_size(batch_size, loaded)}
    options["is_refusal"] = data.is_refusal
    options["starts"] = [
        name for name in STARTS if (TURN_FAMILY if RECIPES[name].by_turn else MODALITY_FAMILY) in families
    ]
    space = Space.of(loaded, layers=tuple(layers) or None, families=tuple(families), batch_size=batch_size)
    return Plan(loaded, processor, data.prompts(chosen, True), asked, judge, space, rule, options)


def facts(found: Tuned) -> dict[str, str]:
    """What was chosen, for people."""
    chosen, base = found.chosen.measured, found.undefended
    return {
        "chosen": f"trial {found.chosen.number}" + ("" if found.kept else ", though it keeps no limit"),
        "recipe": told_recipe(found.recipe),
        "attacks": f"{chosen.success.percent} % of {chosen.success.n} succeed, {base.success.percent} % without repair",
        "benign": f"{chosen.over_refusal.count} of {chosen.over_refusal.n} refused",
        "mind": "these prompts chose the recipe, so that its figures are too good; measure it on others",
    }
