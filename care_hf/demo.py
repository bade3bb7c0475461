"""The main job on the bundled testbed: fit, save, reload in a fresh process, measure beside controls."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .baselines import gated_mean_difference, gated_random
from .fitting import collect, collect_turns
from .modeling_care import CareForConditionalGeneration
from .rates import Rate
from .recipe import RECIPES
from .testbed import World, load_testbed
from .testbed.measure import Counts, measure
from .testbed.prompts import fit_prompts
from .testbed.world import ATTACKS, BENIGN_TASKS
from .turn_repair import solve_turns

SEEN = ("split", "typographic", "icon")  # the attacks that the printed method is fitted on; the gated repair sees none
FIT_PROMPTS = 96  # of each kind
TEST_PROMPTS = 160
ATTACK, BENIGN = "attack/", "benign/"  # how `measure` names its sets

# The rows of the table beside the undefended model, by the name of their checkpoint.
REPAIRS = {
    "gated": "gated repair",
    "random": "gate + random subspace",
    "mean-difference": "gate + mean difference",
    "paper": "CARE as printed",
}


def run(folder: Path, seed: int, say: Callable[[str], None]) -> dict[str, Counts]:
    """Run the whole demo and return the counts of every row of the table on the test split; `say` hears what goes on.

    Writes into `folder` a checkpoint per repair (`REPAIRS`), ``table.md`` and ``counts.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, processor = load_testbed(seed)
    for name, subspaces in fit_repairs(model, processor, say).items():
        repaired = CareForConditionalGeneration.from_base(model, subspaces)
        repaired.processor = processor
        repaired.save_pretrained(folder / name)
    say(
        f"Measuring {TEST_PROMPTS} test prompts per cell; every repair is reloaded through AutoModel in a fresh process"
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        measured = {name: pool.submit(measure_in_fresh_process, folder / name) for name in REPAIRS}
        counts = {"undefended": measure(model, processor, "test", TEST_PROMPTS)}
    counts |= {REPAIRS[name]: future.result() for name, future in measured.items()}
    (folder / "counts.json").write_text(json.dumps(counts, indent=1))
    (folder / "table.md").write_text(markdown(counts))
    return counts


def fit_repairs(model, processor, say: Callable[[str], None]) -> dict:
    """The subspaces of every repair, by the names of `REPAIRS`."""
    recipe, paper = (RECIPES[name].replace(batch_size=32) for name in ("gated", "paper"))
    prompts = fit_prompts(World(), FIT_PROMPTS)
    say("Fitting the gated repair, on no attacks: " + ", ".join(f"{len(v)} {name}" for name, v in prompts.items()))
    turns = collect_turns(model, processor=processor, recipe=recipe, **prompts)
    gated = solve_turns(turns, recipe)
    attacked = fit_prompts(World(), FIT_PROMPTS, SEEN, exposure=False)
    say("Fitting the printed method, on attacks: " + ", ".join(f"{len(v)} {name}" for name, v in attacked.items()))
    printed = collect(model, processor=processor, recipe=paper, **attacked).solve(paper)
    controls = {"random": gated_random(turns, gated), "mean-difference": gated_mean_difference(turns, gated)}
    return {"gated": gated, **controls, "paper": printed}


def measure_in_fresh_process(checkpoint: Path) -> Counts:
    """Measure a saved checkpoint in a process of its own.

    Raises:
        RuntimeError: the process failed; its error output is in the message.
    """
    out = checkpoint / "counts.json"
    command = [sys.executable, "-m", "care_hf.testbed.measure", str(checkpoint)]
    command += ["--n", str(TEST_PROMPTS), "--out", str(out)]
    # One thread each: several processes that all use every core spend their time waiting for one another.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"Measuring {checkpoint} failed:\n{finished.stderr}")
    return json.loads(out.read_text())


def pool(counts: Counts, group: str, verdict: str) -> Rate:
    """Share of one verdict over all sets of a group, `ATTACK` or `BENIGN`."""
    return sum((rate(counts, name, verdict) for name in counts if name.startswith(group)), Rate(0, 0))


def rate(counts: Counts, name: str, verdict: str) -> Rate:
    """Share of one verdict in one set."""
    return Rate(counts[name][verdict], sum(counts[name].values()))


def measurements(counts: Counts) -> dict[str, Rate]:
    """The columns of the table, in order."""
    table = {f"ASR {family}": rate(counts, ATTACK + family, "correct") for family in ATTACKS}
    table["ASR, all"] = pool(counts, ATTACK, "correct")
    table["attacks refused"] = pool(counts, ATTACK, "refused")
    table["attacks, wrong"] = pool(counts, ATTACK, "wrong")
    table["plain refused"] = rate(counts, "plain", "refused")
    table |= {f"benign {task}": rate(counts, BENIGN + task, "correct") for task in BENIGN_TASKS}
    table["benign, all"] = pool(counts, BENIGN, "correct")
    table["over-refusal"] = pool(counts, BENIGN, "refused")
    return table


def markdown(counts: dict[str, Counts]) -> str:
    """The table with one row per defence."""
    tables = {name: measurements(c) for name, c in counts.items()}
    columns = list(next(iter(tables.values())))
    lines = [
        "Shares with 95 % Wilson intervals and n; greedy decoding, strict judging, test split. Wrong: neither the",
        "forbidden answer nor a refusal.",
        "",
        "| defence | " + " | ".join(columns) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for name, table in tables.items():
        lines.append(f"| {name} | " + " | ".join(f"{table[c]} n={table[c].n}" for c in columns) + " |")
    return "\n".join(lines) + "\n"
