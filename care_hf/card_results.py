"""Measurements as a model card shows them: a table with intervals, and the Hub's `EvalResult`s."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .rates import Rate
from .report import Report

# By the start of a set's name: the verdict that is counted, what a leaderboard calls it, and what a reader does.
MEASURED = {
    "attack/": [("complied", "attack_success_rate", "attack success (lower is better)")],
    "harmful": [("refused", "refusal_rate", "harmful requests refused")],
    "benign/": [("complied", "accuracy", "benign answers right"), ("refused", "over_refusal_rate", "benign refused")],
}


def read_report(report: Report | Mapping[str, Any] | str | Path) -> Report:
    """A report from itself, from its plain values, from a ``report.json``, or from the folder of one.

    The answers are not in those, and of the verdicts of a set only how many there are.

    Raises:
        ValueError: what is given is no report.
    """
    if isinstance(report, Report):
        return report
    if not isinstance(report, Mapping):
        path = Path(report)
        path = path / "report.json" if path.is_dir() else path
        try:
            report = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path.name} is no report of an evaluation ({error}).") from error
    try:
        results = {
            name: {**found, "sets": {label: {"verdicts": _verdicts(one)} for label, one in found["sets"].items()}}
            for name, found in report["results"].items()
        }
        return Report(results, report["settings"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"This is no report of an evaluation: {error!r}.") from error


def _verdicts(counts: Mapping[str, Mapping[str, int]]) -> dict[str, list[str]]:
    return {judge: [v for v, count in by.items() for _ in range(count)] for judge, by in counts.items()}


def chosen_defence(report: Report, defence: str = "") -> str:
    """Which row of a report is the model of the card.

    Raises:
        ValueError: it has no such row, or several could be meant.
    """
    others = list(report.results)[1:]
    if defence in others:
        return defence
    if not defence and (len(others) == 1 or "repaired" in others):
        return "repaired" if "repaired" in others else others[0]
    raise ValueError(f"defence={defence!r} must name the model's row in the report, one of {others}.")


def eval_results(report: Report, defence: str, task: str) -> list[EvalResult]:
    """Every rate of one row, a share in [0, 1], with its count, interval and undefended value among the arguments."""
    undefended, found = next(iter(report.results)), []
    for name in report.results[defence]["sets"]:
        for verdict, metric, told in _measured(name):
            rate, before = report.rate(defence, name, verdict), report.rate(undefended, name, verdict)
            if not rate.n:
                continue
            details = {"count": rate.count, "n": rate.n, "interval_95": [round(end, 4) for end in rate.interval]}
            details |= {"undefended": round(before.value, 4)} if before.n else {}
            found.append(
                EvalResult(
                    task_type=task,
                    dataset_type=report.settings["suite"],
                    dataset_name=f"{report.settings['suite']}: {name}",
                    dataset_config=name,
                    metric_type=metric,
                    metric_name=f"{told}, by judge {report.judge}",
                    metric_value=round(rate.value, 4),
                    metric_args=details,
                )
            )
    return found


def results_table(report: Report, defence: str) -> str:
    """One line per set and measure: undefended and this model, percent with 95 % intervals."""
    undefended = next(iter(report.results))
    lines = ["| measured | n | undefended | this model |", "| --- | ---: | ---: | ---: |"]
    for name in report.results[defence]["sets"]:
        for verdict, _, told in _measured(name):
            rates = [report.rate(row, name, verdict) for row in (undefended, defence)]
            if rates[1].n:
                label = f"{name}: {told}".replace("|", "\\|")
                lines.append(f"| {label} | {rates[1].n} | {rates[0].percent} | {rates[1].percent} |")
    return "\n".join(lines)


def gradient_rates(report: Report, defence: str) -> tuple[Rate, Rate] | None:
    """Success of gradient attacks at the first radius, undefended and through the defence; None if none was tried."""
    names = (next(iter(report.results)), defence)
    rates = [report.rate_at(name) if report.results[name]["gradient"] else Rate(0, 0) for name in names]
    return (rates[0], rates[1]) if all(rate.n for rate in rates) else None


def _measured(name: str) -> list[tuple[str, str, str]]:
    return next((told for start, told in MEASURED.items() if name.startswith(start)), [])
