"""What everything costs, as ratios: ``python benchmarks/all_costs.py`` renews docs/results/costs.md.

Each measures both sides of its ratio in turns in one run. Some 25 minutes on 2 idle cores; ``--only`` runs some parts
and keeps the others as they are.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "costs.md"
PARTS = {
    "overhead": (
        "A forward of the repaired model over the base's",
        "One decoder layer of a 7B model (4096, 11008) in a LLaVA. `merged`: one subspace folded into the weights; "
        "`lora`: PEFT's adapter of equal rank on the same linear layer; `hook`: a plain forward hook that projects.",
        "repair_cost.py --rounds 15 --dtypes float32 --repairs gated adaptive merged lora hook".split(),
    ),
    "fit": (
        "A fit over the plain forward of its prompts",
        "![growth](costs.png)",
        "fit_scaling.py --rounds 3 --figure docs/results/costs.png".split(),
    ),
    "collect": (
        "Collecting, with the forward ended early, over a plain forward",
        "n = 10 rounds; more of them, and what is in them, in [collect.md](collect.md).",
        "collect_cost.py --rounds 10".split(),
    ),
    "solve": (
        "Solving, against scipy",
        "What the columns and spectra are, and d = 4096 and 8192: [solve.md](solve.md).",
        "solve_scale.py --largest 2048".split(),
    ),
    "trace": ("A causal trace over the loop that one would write", "", "trace_speed.py --n 4 --rounds 1".split()),
    "start": ("Starting", "", ["import_time.py"]),
}
ELSEWHERE = (
    "Every repair, in bfloat16, too: [repair_cost.md](repair_cost.md). Memory of a merge: [merge.md](merge.md). Not "
    "measured on a GPU."
)


def run(arguments: list[str]) -> str:
    """What a benchmark prints, as Markdown."""
    script, *rest = arguments
    command = [sys.executable, str(ROOT / "benchmarks" / script), *rest]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if finished.returncode:
        raise RuntimeError(f"{script} failed:\n{finished.stderr}")
    told = finished.stdout.strip()
    return told if "| --- |" in told else f"```\n{told}\n```"


def section(name: str) -> str:
    title, told, command = PARTS[name]
    shown = "`python benchmarks/" + " ".join(command) + "`"
    return "\n\n".join(part for part in (f"## {title}", told, shown, run(command)) if part)


def written() -> dict[str, str]:
    """The page's sections by their titles."""
    if not PAGE.exists():
        return {}
    found = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {text.splitlines()[0]: f"## {text.strip()}" for text in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, "
    machine += f"transformers {transformers.__version__}, no GPU"
    head = f"# What it costs\n\nRenewed by `python benchmarks/all_costs.py` on {machine}. {ELSEWHERE}"
    for name in parser.parse_args().only:
        new = section(name)
        print(new, flush=True)
        sections = written() | {PARTS[name][0]: new}  # at once: a later part may fail
        ordered = [sections[title] for title, *_ in PARTS.values() if title in sections]
        PAGE.write_text("\n\n".join([head, *ordered]) + "\n")


if __name__ == "__main__":
    main()
