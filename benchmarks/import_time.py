"""``python benchmarks/import_time.py``: what starting costs: ``import care_hf`` and ``care --help``."""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

BASE = "from transformers import PreTrainedModel, AutoModelForImageTextToText"
CARE = str(Path(sys.executable).with_name("care"))


def seconds(*command: str) -> float:
    """Wall time of a fresh process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Time all in turns, after a first round that fills the caches."""
    commands = [(sys.executable, "-c", BASE), (sys.executable, "-c", "import care_hf"), (CARE, "--help")]
    rounds = [[seconds(*command) for command in commands] for _ in range(11)][1:]
    base, ours, console = (median(column) for column in zip(*rounds, strict=True))
    print(f"transformers {base:.2f} s, care_hf {ours:.2f} s, ratio {ours / base:.3f}; care --help {console:.2f} s")


if __name__ == "__main__":
    main()
