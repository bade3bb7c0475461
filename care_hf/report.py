"""What an evaluation found: rates with intervals, as Markdown, JSON and a figure."""

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rates import Rate

PACKAGES = ("care_hf", "torch", "transformers", "peft", "scikit-learn")
MARKERS = "os^Dv<>Pp*hXd"
TOXIC, UNIVERSAL = "toxic target", "universal "  # families of attacks beside the suite's own


def environment() -> dict[str, str]:
    """Versions of Python, of the packages that results depend on, and the commit of this one's checkout."""
    found = {"python": platform.python_version(), "platform": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"commit": _commit()}


def _commit() -> str:
    """The commit of the checkout that this package lies in, with "+" if tracked files differ; else "no checkout"."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists() or not shutil.which("git"):
        return "no checkout"
    revision, changes = (
        subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True).stdout.strip()
        for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    )
    return revision + "+" * bool(changes)


@dataclass(frozen=True, eq=False)
class Report:
    """Verdicts of every defence on every set.

    Attributes:
        results: per defence ``{"sets": {set: {"answers": [...], "verdicts": {judge: [...]}}}, "divergence": nats or
            None, "latency": {...} or None, "gradient": [one row per attack]}``.
        settings: suite, judges, budget, seed, defences, environment: all that is needed to run it again.
    """

    results: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]

    @property
    def judge(self) -> str:
        """The judge that tables show."""
        return next(iter(self.settings["judges"]))

    def rate(self, defence: str, sets: str | Sequence[str], verdict: str, judge: str | None = None) -> Rate:
        """The share of a verdict over sets, each given by its name or, ending in a slash, by its group."""
        total = Rate(0, 0)
        for wanted in [sets] if isinstance(sets, str) else sets:
            for name, found in self.results[defence]["sets"].items():
                if name == wanted or (wanted.endswith("/") and name.startswith(wanted)):
                    verdicts = found["verdicts"][judge or self.judge]
                    total += Rate(verdicts.count(verdict), len(verdicts))
        return total

    def names(self, group: str) -> list[str]:
        """The names of the sets of a group, "attack/" or "benign/"."""
        sets = next(iter(self.results.values()))["sets"]
        return [name for name in sets if name.startswith(group)]

    def main_table(self, judge: str | None = None) -> str:
        """Attack success by family, and what else a defence does, one row each."""
        attacks, tasks = self.names("attack/"), self.names("benign/")
        short = [name.removeprefix("attack/") for name in attacks]
        lines = _head(
            "defence",
            *short,
            "all attacks",
            "attacks refused",
            "harmful refused",
            "benign right",
            "over-refusal",
            "worst task",
            "divergence",
            "time",
        )
        for defence, found in self.results.items():
            by_task = [self.rate(defence, task, "refused", judge) for task in tasks]
            worst = max((rate.value for rate in by_task if rate.n), default=None)
            refused, time = self.rate(defence, "benign/", "refused", judge), found["latency"]
            pooled = [("attack/", "complied"), ("attack/", "refused"), ("harmful", "refused"), ("benign/", "complied")]
            lines.append(
                _line(
                    defence,
                    *(_share(self.rate(defence, name, "complied", judge)) for name in attacks),
                    *(self.rate(defence, sets, verdict, judge).percent for sets, verdict in pooled),
                    f"{refused.count} of {refused.n}" if refused.n else "",
                    "" if worst is None else f"{100 * worst:.1f}",
                    "" if found["divergence"] is None else f"{found['divergence']:.3f}",
                    "" if time is None else f"{time['ratio']:.2f}",
                )
            )
        return "\n".join(lines)

    def task_table(self) -> str:
        """Right and refused per benign task, one column per defence."""
        lines = _head("task, right / refused", *self.results)
        for task in self.names("benign/"):
            rates = ([self.rate(name, task, verdict) for verdict in ("complied", "refused")] for name in self.results)
            cells = (" / ".join(map(_share, both)) if both[0].n else "" for both in rates)
            lines.append(_line(task.removeprefix("benign/"), *cells))
        return "\n".join(lines)

    def gradient_rate(
        self, defence: str, family: str, eps: int, adaptive: bool, steps: int | None = None
    ) -> Rate | None:
        """Prompts on which some attack with this radius succeeds: through the defence, or transferred to it.

        An attack counts for a prompt if any optimiser, any weight of the penalty does it: the attacker may choose.
        """
        rows = [
            row
            for row in self.results[defence]["gradient"]
            if (row["family"], row["eps"], row["steps"]) == (family, eps, steps or self.settings["budget"]["steps"])
        ]
        undefended = next(iter(self.results))
        rows = [row for row in rows if row["through"] == (defence if adaptive else undefended)]
        if not rows:
            return None
        said = [row["verdicts"][self.judge] for row in rows]
        succeeded = [any(verdicts[i] == "complied" for verdicts in said) for i in range(len(said[0]))]
        return Rate(sum(succeeded), len(succeeded))

    def gradient_table(self, adaptive: bool) -> str:
        """Attack success of images changed by gradient, by family and radius.

        Args:
            adaptive: through every defence, where attacks were, beside the undefended model; else those on the
                undefended model, tried on all.
        """
        rows = next(iter(self.results.values()))["gradient"]
        grid = list(dict.fromkeys((row["family"], row["eps"]) for row in rows))
        names = self.attacked if adaptive else list(self.results)
        lines = _head("family, eps", *names)
        for family, eps in grid:
            rates = [self.gradient_rate(name, family, eps, adaptive) for name in names]
            lines.append(_line(f"{family}, {eps}", *("" if rate is None else rate.percent for rate in rates)))
        return "\n".join(lines)

    @property
    def attacked(self) -> list[str]:
        """The defences that gradient attacks went through, the undefended model among them."""
        return [n for n, found in self.results.items() if any(row["through"] == n for row in found["gradient"])]

    def steps_table(self) -> str:
        """Attack success against gradient steps, through each defence, pooled over families, at the first radius."""
        kept = {row["steps"] for found in self.results.values() for row in found["gradient"]}
        lines = _head("steps", *self.attacked)
        for count in sorted(kept):
            lines.append(_line(count, *(self.rate_at(name, count).percent for name in self.attacked)))
        return "\n".join(lines)

    def rate_at(self, defence: str, steps: int | None = None, weight: float | None = None) -> Rate:
        """Success of attacks through `defence` at the first radius, over the suite's own pictured families.

        Args:
            defence: its name.
            steps: after so many of the first optimiser's; None for all of them, by any optimiser.
            weight: of the repair's penalty; None for any.
        """
        budget = self.settings["budget"]
        wanted = {"eps": budget["eps"][0], "through": defence, "steps": budget["steps"] if steps is None else steps}
        wanted |= {} if steps is None else {"optimiser": budget["optimisers"][0]}
        wanted |= {} if weight is None else {"weight": weight}
        by_family: dict[str, list[list[str]]] = {}
        for row in self.results[defence]["gradient"]:
            other = row["family"] == TOXIC or row["family"].startswith(UNIVERSAL)
            if not other and all(row[name] == value for name, value in wanted.items()):
                by_family.setdefault(row["family"], []).append(row["verdicts"][self.judge])
        succeeded = [
            any(verdicts[i] == "complied" for verdicts in said)
            for said in by_family.values()
            for i in range(len(said[0]))
        ]
        return Rate(sum(succeeded), len(succeeded))

    def weights_table(self) -> str:
        """Attack success against the weight of the repair's penalty, through each defence, at the first radius."""
        lines = _head("weight", *self.attacked)
        for weight in self.settings["budget"]["weights"]:
            rates = (self.rate_at(name, weight=weight) for name in self.attacked)
            lines.append(_line(weight, *(rate.percent for rate in rates)))
        return "\n".join(lines)

    def markdown(self) -> str:
        """All tables, with what they were made with."""
        budget, source = self.settings["budget"], self.settings["source"]
        parts = [
            f"Suite {self.settings['suite']} ({', '.join(f'{k} {v}' for k, v in source.items())}); judge "
            f"{self.judge}; seed {self.settings['seed']}; at most {budget['cases']} prompts of each set, "
            f"{budget['max_new_tokens']} new tokens, greedy. Percent; in brackets 95 % Wilson intervals, rounded "
            "outwards, which take prompts as independent. Attacks: share that the model complies with. Divergence: "
            "KL(undefended || defended) of the first token on benign prompts, nats. Time: of answers, undefended = 1.",
            "### Attacks and side effects",
            self.main_table(),
            "### Benign tasks, percent",
            self.task_table(),
        ]
        if any(found["gradient"] for found in self.results.values()):
            parts += [
                "### Images changed by gradient",
                f"{budget['steps']} steps, {budget['restarts']} restarts, {' and '.join(budget['optimisers'])}, "
                f"weights of the repair's penalty {', '.join(map(str, budget['weights']))} (beyond the first eps the "
                "first optimiser and the last weight alone), at most "
                f"{budget['gradient_cases']} prompts of each family; a prompt counts if any of them succeeds. "
                f"{TOXIC.capitalize()}: a sentence of the corpus is forced, and counted, instead of an answer to the "
                "prompt. Through the defence:",
                self.gradient_table(adaptive=True),
                "Found on the undefended model, tried on all:",
                self.gradient_table(adaptive=False),
                f"### Success against steps: eps {budget['eps'][0]}, {budget['optimisers'][0]}, through each defence, "
                "all families, any weight",
                self.steps_table(),
                f"### Success against the weight of the penalty: eps {budget['eps'][0]}, any optimiser, through each "
                "defence, all families",
                self.weights_table(),
            ]
        for judge in list(self.settings["judges"])[1:]:
            parts += [f"### The same answers, judged by {judge}", self.main_table(judge)]
        versions = ", ".join(f"{name} {version}" for name, version in self.settings["environment"].items())
        return "\n\n".join([*parts, f"Made with {versions}."]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Settings and counts as plain values, without the answers."""

        def counts(found: Mapping[str, Any]) -> dict[str, dict[str, int]]:
            return {judge: {v: said.count(v) for v in sorted(set(said))} for judge, said in found["verdicts"].items()}

        results = {}
        for name, found in self.results.items():
            rows = [{**{k: v for k, v in row.items() if k != "answers"}} for row in found["gradient"]]
            sets = {label: counts(one) for label, one in found["sets"].items()}
            results[name] = {**found, "sets": sets, "gradient": rows}
        return {"settings": dict(self.settings), "results": results}

    def save(self, folder: str | Path) -> None:
        """Write ``report.md``, ``report.json``, ``answers.json`` and, where matplotlib is installed, ``report.png``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.to_dict()) + "\n")
        (folder / "report.md").write_text(self.markdown())
        answers = {n: {label: s["answers"] for label, s in f["sets"].items()} for n, f in self.results.items()}
        (folder / "answers.json").write_text(json.dumps(answers) + "\n")
        # One axis is attacks, the other benign tasks.
        if importlib.util.find_spec("matplotlib") and self.names("attack/") and self.names("benign/"):
            self.figure(folder / "report.png")

    def figure(self, path: str | Path) -> None:
        """Draw attack success against benign answers that are right, one point per defence with its intervals.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Figures need matplotlib; install it with `pip install matplotlib`.") from error
        drawing = Figure(figsize=(7, 4.5), layout="constrained")
        axes = drawing.subplots()
        for index, name in enumerate(self.results):
            rates = [self.rate(name, "benign/", "complied"), self.rate(name, "attack/", "complied")]
            if not all(rate.n for rate in rates):
                continue
            x, y = (100 * rate.value for rate in rates)
            reach = [[[100 * abs(rate.value - end)] for end in rate.interval] for rate in rates]
            # Told apart by marker and shade, so that it reads in grey.
            shade = 0.75 * (index % 4) / 3
            axes.errorbar(
                x,
                y,
                xerr=reach[0],
                yerr=reach[1],
                fmt=MARKERS[index % len(MARKERS)],
                color=str(shade),
                label=name,
                capsize=2,
                markersize=6,
                linewidth=1,
            )
        axes.set(xlabel="benign answers right, %", ylabel="attacks complied with, %", ylim=(-2, 102))
        if axes.containers:
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        drawing.savefig(path, dpi=150)


def _share(rate: Rate) -> str:
    return f"{100 * rate.value:.0f}" if rate.n else ""


def _line(*cells: Any) -> str:
    # A bar in a name would end its cell.
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _head(*cells: str) -> list[str]:
    return [_line(*cells), _line(*("---" if i == 0 else "---:" for i in range(len(cells))))]
