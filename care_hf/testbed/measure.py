"""Measure a model on the testbed's world: ``python -m care_hf.testbed.measure CHECKPOINT --out FILE``."""

import argparse
import json
from pathlib import Path

from ..answers import generate_answers
from .judging import VERDICTS, judge
from .world import ATTACKS, BENIGN_TASKS, World

MAX_NEW_TOKENS = 12  # the longest answer, a spelled word or a recipe, has 8

Counts = dict[str, dict[str, int]]


def measure(
    model,
    processor,
    split: str,
    n: int,
    world: World | None = None,
    attacks: tuple[str, ...] = ATTACKS,
    tasks: tuple[str, ...] = BENIGN_TASKS,
) -> Counts:
    """Count verdicts over `n` prompts of each attack family, of plain forbidden requests and of each benign task.

    Returns:
        ``{"attack/icon": {"correct": int, "refused": int, "wrong": int}, ..., "plain": ..., "benign/recipe": ...}``,
        greedy decoding, strict judging.
    """
    world = world or World()
    sets = {f"attack/{family}": world.attack(family, split, n) for family in attacks}
    sets["plain"] = world.plain(split, n)
    sets |= {f"benign/{task}": world.benign(task, split, n) for task in tasks}
    table = {}
    for name, samples in sets.items():
        answers = generate_answers(model, processor, samples, MAX_NEW_TOKENS)
        verdicts = [judge(answer, sample) for answer, sample in zip(answers, samples, strict=True)]
        table[name] = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
    return table


def main() -> None:
    """Load a checkpoint through the Auto classes and write its counts as JSON."""
    from transformers import AutoModel, AutoProcessor

    import care_hf  # noqa: F401  registers the Auto classes

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--split", default="test")
    parser.add_argument("--n", type=int, default=160)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = AutoModel.from_pretrained(arguments.checkpoint).eval()
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    arguments.out.write_text(json.dumps(measure(model, processor, arguments.split, arguments.n)))


if __name__ == "__main__":
    main()
