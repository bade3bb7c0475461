"""Turn what ``repair_study.py`` wrote into the tables of docs/results/repair.md, between its markers.

``python benchmarks/repair_report.py FOLDER`` reads FOLDER/seed0, seed1, meaningful0, ... and writes the tables, and all
counts as docs/results/repair.json.
"""

import json
import math
import sys
from pathlib import Path

from care_hf.rates import Rate
from care_hf.testbed.world import ATTACKS, BENIGN_TASKS, BESIDE_IMAGE

DOCS = Path(__file__).parents[1] / "docs" / "results"
BEGIN, END = "<!-- tables: benchmarks/repair_report.py -->\n", "<!-- end of tables -->\n"
ROWS = (
    "undefended",
    "printed",
    "gated, no attacks",
    "gated",
    "gated, all families",
    "gated, no exposed prompts",
    "gated, last token only",
    "gate + random",
    "gate + mean difference",
    "gate + ASTRA",
    "gate + printed basis",
    "ungated",
    "detector + canned refusal (gated, no attacks)",
    "detector + canned refusal (gated)",
    "LoRA, no attacks",
    "LoRA",
)
WORLDS = {"meaningful": "harm with meaning in the answer", "none": "no shared hazard cue"}


def percent(rate: Rate) -> str:
    """Percent and its Wilson interval, rounded outwards."""
    low, high = rate.interval
    return f"{100 * rate.value:.0f} ({math.floor(100 * low + 1e-9)}-{math.ceil(100 * high - 1e-9)})"


def rate(counts: dict, names: list[str], verdict: str) -> Rate:
    """A verdict's share over several sets."""
    return sum(
        (Rate(counts[n][verdict], sum(counts[n][v] for v in ("correct", "refused", "wrong"))) for n in names),
        Rate(0, 0),
    )


def line(*cells) -> str:
    """One row of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*cells) -> list[str]:
    """The first two rows of a table."""
    return [line(*cells), line(*("---" if i == 0 else "---:" for i in range(len(cells))))]


def main_table(results: dict) -> list[str]:
    """One row per defence: strict ASR per family, pooled figures, side effects."""
    attacks, tasks = [f"attack/{a}" for a in ATTACKS], [f"benign/{t}" for t in BENIGN_TASKS]
    lines = head("", *ATTACKS, "all", "attacks refused", "plain refused", "benign right", "over-refusal", "worst task")
    for name in ROWS:
        counts = results.get(f"table {name}")
        if counts is None:
            continue
        worst = max(rate(counts, [task], "refused").value for task in tasks)
        lines.append(
            line(
                name,
                *(f"{100 * rate(counts, [family], 'correct').value:.0f}" for family in attacks),
                percent(rate(counts, attacks, "correct")),
                percent(rate(counts, attacks, "refused")),
                percent(rate(counts, ["plain"], "refused")),
                percent(rate(counts, tasks, "correct")),
                f"{rate(counts, tasks, 'refused').count} of {rate(counts, tasks, 'refused').n}",
                f"{100 * worst:.1f}",
            )
        )
    return lines


def transfer_table(seeds: dict[str, dict]) -> list[str]:
    """One row per family left out of the fit."""
    lines = head(
        "left out", *(f"{what}, {seed}" for seed in seeds for what in ("undefended", "with exposed", "without exposed"))
    )
    rates = {family: [] for family in ATTACKS}
    for family, row in rates.items():
        for results in seeds.values():
            tables = [results["table undefended"]]
            tables += [results[f"transfer {family} {kind} exposed"] for kind in ("with", "without")]
            row += [rate(table, [f"attack/{family}"], "correct") for table in tables]
        lines.append(line(family, *map(percent, row)))
    pooled = [sum(column, Rate(0, 0)) for column in zip(*rates.values(), strict=True)]
    return [*lines, line("all", *map(percent, pooled))]


def points_table(results: dict) -> list[str]:
    """One row per fit and share of false alarms: what the threshold trades."""
    attacks, tasks = [f"attack/{a}" for a in ATTACKS], [f"benign/{t}" for t in BENIGN_TASKS]
    lines = head("fit", "false alarms", "ASR", "attacks refused", "over-refusal", "worst task")
    for fit, curve in results["calibration"].items():
        tables = {float(name.rsplit(" ", 1)[1]): t for name, t in results.items() if name.startswith(f"point {fit} 0")}
        if not tables:
            continue
        tables[curve["target"]] = results[f"table {fit}"]
        for share, counts in sorted(tables.items()):
            refused = rate(counts, tasks, "refused")
            worst = max(rate(counts, [task], "refused").value for task in tasks)
            asr, stopped = (percent(rate(counts, attacks, verdict)) for verdict in ("correct", "refused"))
            lines.append(
                line(fit, f"{100 * share:g} %", asr, stopped, f"{refused.count} of {refused.n}", f"{100 * worst:.1f}")
            )
    return lines


def benign_table(seeds: dict[str, dict]) -> list[str]:
    """Refusals of every benign task, on more prompts than the main table has."""
    fits = [name for name in next(iter(seeds.values())) if name.startswith("benign ")]
    lines = head("refused", *(f"{name.removeprefix('benign ')}, {seed}" for seed in seeds for name in fits))
    for task in BENIGN_TASKS:
        rates = (rate(results[name], [f"benign/{task}"], "refused") for results in seeds.values() for name in fits)
        lines.append(line(task, *(f"{r.count} of {r.n} (up to {100 * r.interval[1]:.1f} %)" for r in rates)))
    return lines


def beside_table(seeds: dict[str, dict]) -> list[str]:
    """Text jailbreaks beside an unrelated image, strict ASR, of which no fit knows anything."""
    fits = [name for name in next(iter(seeds.values())) if name.startswith("beside ")]
    lines = head("", *(f"{family}, {seed}" for seed in seeds for family in BESIDE_IMAGE))
    for name in fits:
        cells = [
            percent(rate(results[name], [f"attack/{family}"], "correct"))
            for results in seeds.values()
            for family in BESIDE_IMAGE
        ]
        lines.append(line(name.removeprefix("beside "), *cells))
    return lines


def calibration_table(seeds: dict[str, dict]) -> list[str]:
    """Shares of held-out fit prompts that set off the gate, by target."""
    lines = head("target", *(f"{what}, {seed}" for seed in seeds for what in ("benign", "exposed", "malicious")))
    curves = [results["calibration"]["gated, no attacks"]["curve"] for results in seeds.values()]
    for points in zip(*curves, strict=True):
        cells = [f"{100 * point[what]:.2f}" for point in points for what in ("benign", "exposed", "malicious")]
        lines.append(line(f"{100 * points[0]['target']:g} %", *cells))
    return lines


def main() -> None:
    """Read, and write."""
    folder = Path(sys.argv[1])
    data = {
        part.name: {file.stem: json.loads(file.read_text()) for file in sorted(part.glob("*.json"))}
        for part in sorted(folder.iterdir())
        if part.is_dir()
    }
    (DOCS / "repair.json").write_text(json.dumps(data))
    seeds = {f"seed {i}": data[f"seed{i}"] for i in (0, 1)}
    lines = []
    for seed, results in seeds.items():
        lines += [f"### Main table, {seed}", "", *main_table(results), ""]
    for seed, results in seeds.items():
        lines += [f"### Operating points, {seed}", "", *points_table(results), ""]
    lines += ["### Over-refusal, on more prompts", "", *benign_table(seeds), ""]
    lines += ["### Text jailbreaks beside an unrelated image, strict ASR", "", *beside_table(seeds), ""]
    lines += ["### Transfer: strict ASR on a family that is left out of the fit", "", *transfer_table(seeds), ""]
    for world, what in WORLDS.items():
        for i in (0, 1):
            if f"{world}{i}" in data:
                lines += [f"### World: {what}, seed {i}", "", *main_table(data[f"{world}{i}"]), ""]
    lines += [
        "### Calibration of `gated, no attacks`, percent of held-out fit prompts",
        "",
        *calibration_table(seeds),
        "",
    ]
    page = DOCS / "repair.md"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
