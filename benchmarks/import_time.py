"""``python benchmarks/import_time.py``: time of ``import care_hf`` over that of the transformers names it needs."""

import subprocess
import sys
import time
from statistics import median

BASE = "from transformers import PreTrainedModel, AutoModelForImageTextToText"


def seconds(code: str) -> float:
    """Wall time of a fresh interpreter that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Time both in turns."""
    pairs = [(seconds(BASE), seconds("import care_hf")) for _ in range(11)][1:]
    base, ours = (median(column) for column in zip(*pairs, strict=True))
    print(f"transformers {base:.2f} s, care_hf {ours:.2f} s, ratio {ours / base:.3f}")


if __name__ == "__main__":
    main()
