"""The testbed as what a user has: a model in a folder and prompts in files, to try everything on."""

import json
from pathlib import Path

from PIL import Image

from . import load_testbed
from .prompts import fit_prompts
from .world import World


def write_files(folder: Path, seed: int = 0, n: int = 48, families: tuple[str, ...] = ()) -> dict[str, int]:
    """Write a checkpoint into ``folder/model``, prompts to fit on as JSON lines, and their images as PNG.

    Args:
        folder: made if need be; files of an earlier call are replaced.
        seed: which checkpoint.
        n: prompts of every kind.
        families: attack families that are among the malicious prompts.

    Returns:
        The number of prompts by file: benign, malicious, exposed, neutral.

    Raises:
        ValueError: no checkpoint of that seed is bundled.
    """
    for part in load_testbed(seed):  # in float32: half precision is slow on a CPU
        part.save_pretrained(folder / "model")
    (folder / "images").mkdir(exist_ok=True)
    prompts = fit_prompts(World(), n, families)
    for name, items in prompts.items():
        rows = [_row(folder, f"{name}-{index}", item) for index, item in enumerate(items)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: len(items) for name, items in prompts.items()}


def _row(folder: Path, name: str, prompt: dict) -> dict:
    parts = prompt["messages"][0]["content"]
    image = next((part["image"] for part in parts if part["type"] == "image"), None)
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    return {
        "text": text,
        "image": _write(folder, name, image),
        "kind": prompt["kind"],
        "groups": list(prompt["groups"]),
    }


def _write(folder: Path, name: str, image: Image.Image | None) -> str | None:
    if image is None:
        return None
    path = f"images/{name}.png"
    image.save(folder / path)
    return path
