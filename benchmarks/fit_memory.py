"""Peak memory of `fit` against a plain forward, for growing numbers of prompts.

``python benchmarks/fit_memory.py`` runs each measurement in a process of its own, on images in files, and prints how
far the peak resident memory rises above that of the same work on 32 prompts.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WARM_UP, COUNTS = 32, (64, 256, 1024)
PIXELS = 512  # a photo's size, so that images kept in memory would show: 1024 of them are 768 MiB


def peak() -> float:
    """Peak resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def prompts(samples, folder: Path) -> list[dict]:
    """Dicts with text and the path of an image, written to `folder`."""
    folder.mkdir()
    paths = [folder / f"{index}.bmp" for index in range(len(samples))]
    for sample, path in zip(samples, paths, strict=True):
        Image.fromarray(sample.image).resize((PIXELS, PIXELS)).save(path)
    return [{"text": sample.text, "image": path} for sample, path in zip(samples, paths, strict=True)]


def measure(mode: str, count: int, folder: Path) -> float:
    """Rise of the peak while `mode` runs over `count` prompts, MiB."""
    import torch

    import care_hf
    from care_hf.recipe import Recipe
    from care_hf.samples import collate, load_samples
    from care_hf.sites import image_token_ids
    from care_hf.testbed import World

    model, processor = care_hf.load_testbed()
    benign = prompts(World().benign("typographic", "fit", count // 2), folder / "benign")
    malicious = prompts(World().attack("typographic", "fit", count // 2), folder / "malicious")
    recipe = Recipe.load("paper").replace(batch_size=16)

    @torch.no_grad()
    def forward(benign, malicious):
        samples = load_samples(benign + malicious)
        for start in range(0, len(samples), recipe.batch_size):
            batch = collate(processor, samples[start : start + recipe.batch_size], image_token_ids(model.config))
            model(**batch.inputs)

    def fit(benign, malicious):
        care_hf.fit(model, benign, malicious, processor, recipe)

    work = {"forward": forward, "fit": fit}[mode]
    work(benign[: WARM_UP // 2], malicious[: WARM_UP // 2])  # what is imported and allocated once
    before = peak()
    work(benign, malicious)
    return peak() - before


def main() -> None:
    """Run every measurement in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("MODE", "COUNT"), help="a single measurement, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(arguments.one[0], int(arguments.one[1]), Path(folder)))
        return
    for mode in ("forward", "fit"):
        for count in COUNTS:
            run = [sys.executable, __file__, "--one", mode, str(count)]
            rise = float(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()[-1])
            print(f"{mode:8} {count:5} prompts: peak rises by {rise:7.1f} MiB over {WARM_UP} prompts")


if __name__ == "__main__":
    main()
