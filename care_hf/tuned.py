"""What a tuning found, and its report."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from .rates import Mean
from .recipe import Recipe
from .samples import Sample
from .subspace import SafetySubspaces
from .suite import Case
from .tuning_choice import COMPLETE, DOMINATED, UNSOLVED, Rule, Trial
from .tuning_figure import draw_front
from .tuning_measures import BENIGN, COMPLIED, HARMFUL, Measured

FORMAT = "care_hf.tuning.v1"
SUFFIXES = (".png", ".svg")
BOTH = ("scope", "sites", "rank", "beta", "strength", "projector", "centring", "shrinkage")
OF_TURN = ("gate_layer", "false_alarms", "gate_ridge", "basis", "anchor")
OF_MODALITY = ("fusion", "fusion_weight")


@dataclass(frozen=True, eq=False)
class Tuned:
    """A finished tuning.

    Attributes:
        trials: all, in their order.
        front: the Pareto front, see `pareto`.
        chosen: the trial that `rule` chooses.
        kept: whether it keeps all of the rule's limits; no trial does otherwise.
        rule: see `Rule`.
        undefended: what the base does with the validation prompts.
        subspaces: the chosen repair.
        settings: plain values from which the study could be made again: space, sampler, seed, prompts, judge, versions.
        seen: the `Sample.digest` of every prompt that the tuning saw.
    """

    trials: list[Trial]
    front: list[Trial]
    chosen: Trial
    kept: bool
    rule: Rule
    undefended: Measured
    subspaces: SafetySubspaces
    settings: Mapping[str, Any]
    seen: frozenset[str]

    @property
    def recipe(self) -> Recipe:
        """The chosen one."""
        return self.chosen.recipe

    def check_unseen(self, cases: Sequence[Case]) -> None:
        """Assert that none of `cases`, on which the repair is to be reported, was fitted or chosen on.

        Raises:
            ValueError: some were.
        """
        known = [index for index, case in enumerate(cases) if Sample(case.messages).digest in self.seen]
        if known:
            raise ValueError(
                f"{len(known)} of {len(cases)} prompts were fitted or chosen on (the first is number {known[0]}); "
                "report on others."
            )

    def save(self, folder: str | Path) -> None:
        """Write ``tuning.json``, ``recipe.yaml``, ``repair.safetensors``, ``tuning.md``, ``pareto.png`` and ``.svg``.

        The figure is left out where matplotlib is not installed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tuning.json").write_text(json.dumps(self.to_dict(), indent=1))
        told = f"# {self.rule}\n# Trial {self.chosen.number} of {len(self.trials)}; tuning.md has the others.\n"
        (folder / "recipe.yaml").write_text(told + yaml.safe_dump(self.recipe.to_dict(), sort_keys=False))
        self.subspaces.save(folder / "repair.safetensors")
        drawn = bool(find_spec("matplotlib"))
        for suffix in SUFFIXES if drawn else ():
            draw_front(self.trials, self.front, self.chosen, self.rule, self.undefended, folder / f"pareto{suffix}")
        (folder / "tuning.md").write_text(self.markdown("pareto.png" if drawn else None))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the single prompts' divergences."""
        rule = {**asdict(self.rule), "told": str(self.rule)}
        return {
            "format": FORMAT,
            "rule": rule,
            "chosen": self.chosen.number,
            "kept": self.kept,
            "front": [trial.number for trial in self.front],
            "undefended": summary(self.undefended),
            "trials": [
                {
                    "number": trial.number,
                    "state": trial.state,
                    "reason": trial.reason,
                    "recipe": trial.recipe.to_dict(),
                    "measured": summary(trial.measured) if trial.measured else None,
                }
                for trial in self.trials
            ],
            "settings": dict(self.settings),
            "seen": sorted(self.seen),
        }

    def markdown(self, figure: str | None = None) -> str:
        """The Pareto front with intervals and n, the chosen point, what was pruned and why.

        Args:
            figure: the name of a picture to show.
        """
        states = Counter(trial.state for trial in self.trials)
        counts = ", ".join(f"{states[name]} {name}" for name in (COMPLETE, DOMINATED, UNSOLVED))
        rows = {"undefended": self.undefended}
        rows |= {f"{t.number}{' (chosen)' * (t is self.chosen)}": t.measured for t in self.front}
        if self.chosen not in self.front:  # no trial keeps the limits, or it ties
            rows[f"{self.chosen.number} (chosen)"] = self.chosen.measured
        return (
            "\n\n".join(
                [
                    "# Tuning",
                    f"{len(self.trials)} trials ({counts}), sampler {self.settings['sampler']!r}, seed "
                    f"{self.settings['seed']}. {self.rule}",
                    *([] if self.kept else ["No trial keeps all of these limits."]),
                    f"Chosen is trial {self.chosen.number}: {told_recipe(self.recipe)}.",
                    "## Pareto front",
                    "These prompts chose the point, so that its figures are too good; report it on others. Percent "
                    "with 95 % Wilson intervals, nats a token with 95 % bootstrap intervals.",
                    _table(rows),
                    *([f"![Pareto front]({figure})"] if figure else []),
                    "\n".join(f"- {t.number}: {told_recipe(t.recipe)}" for t in self.front),
                    "## Pruned",
                    _pruned(self.trials),
                ]
            )
            + "\n"
        )


def summary(measured: Measured) -> dict[str, Any]:
    """Counts, and the divergence with its interval."""
    mean = measured.divergence
    told = {"mean": mean.value, "low": mean.low, "high": mean.high, "n": mean.n}
    return {"verdicts": measured.to_dict()["verdicts"], "divergence": told}


def told_recipe(recipe: Recipe) -> str:
    """What was searched of a recipe, in a line."""
    values, names = recipe.to_dict(), [*BOTH, *(OF_TURN if recipe.by_turn else OF_MODALITY)]
    unread = {"projector", "centring", "shrinkage"} if recipe.basis == "pattern" else set()
    unread |= {"beta"} if recipe.anchor == "none" else set()
    unread |= {"fusion_weight"} if recipe.fusion != "constant" else set()
    return ", ".join(f"{name} {_value(values[name])}" for name in names if name not in unread)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(rows: Mapping[str, Measured]) -> str:
    columns = {
        "attack success": lambda m: f"{m.success.percent} n={m.success.n}",
        "attacks refused": lambda m: f"{m.refused.percent} n={m.refused.n}",
        "plain complied": lambda m: _share(m, HARMFUL, COMPLIED),
        "benign divergence": lambda m: f"{_mean(m.divergence)} n={m.divergence.n}",
        "benign refused": lambda m: f"{m.over_refusal.count} of {m.over_refusal.n}",
        "benign right": lambda m: _share(m, BENIGN, COMPLIED),
    }
    lines = [f"| trial | {' | '.join(columns)} |", "| --- " + "| ---: " * len(columns) + "|"]
    lines += [f"| {name} | {' | '.join(tell(m) for tell in columns.values())} |" for name, m in rows.items()]
    return "\n".join(lines)


def _share(measured: Measured, group: str, verdict: str) -> str:
    rate = measured.rate(group, verdict)
    return f"{rate.percent} n={rate.n}" if rate.n else ""


def _mean(mean: Mean) -> str:
    return f"{mean.value:.2g} ({mean.low:.2g}-{mean.high:.2g})"


def _pruned(trials: Sequence[Trial]) -> str:
    pruned = [trial for trial in trials if trial.state != COMPLETE]
    return "\n".join(f"- {t.number} ({t.state}): {t.reason} {told_recipe(t.recipe)}." for t in pruned) or "None."
