"""Peak memory of `fit` against a plain forward, for growing numbers of prompts.

``python benchmarks/fit_memory.py`` runs each measurement in a process of its own and prints how far the peak resident memory rises
above the loaded model and prompts.
"""

import argparse
import resource
import subprocess
import sys

COUNTS = (64, 256, 1024)


def peak() -> float:
    """Peak resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(mode: str, count: int) -> float:
    """Rise of the peak while `mode` runs over `count` prompts, MiB."""
    import torch

    import care_hf
    from care_hf.recipe import Recipe
    from care_hf.samples import Sample, batches, collate
    from care_hf.sites import image_token_ids
    from care_hf.testbed import World

    model, processor = care_hf.load_testbed()
    world = World()
    benign = [Sample(s.messages) for s in world.benign("typographic", "fit", count // 2)]
    malicious = [Sample(s.messages) for s in world.attack("typographic", "fit", count // 2)]
    recipe = Recipe(batch_size=16)

    def forward():
        with torch.no_grad():
            for part in batches(benign + malicious, recipe.batch_size):
                model(**collate(processor, part, image_token_ids(model.config)).inputs)

    if mode == "forward":
        before = peak()
        forward()
    else:
        care_hf.fit(model, benign[:16], malicious[:16], processor, recipe)  # so that lazy imports do not count
        before = peak()
        care_hf.fit(model, benign, malicious, processor, recipe)
    return peak() - before


def main() -> None:
    """Run every measurement in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("MODE", "COUNT"))
    arguments = parser.parse_args()
    if arguments.one:
        print(measure(arguments.one[0], int(arguments.one[1])))
        return
    for mode in ("forward", "fit"):
        for count in COUNTS:
            run = [sys.executable, __file__, "--one", mode, str(count)]
            rise = float(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()[-1])
            print(f"{mode:8} {count:5} prompts: peak rises by {rise:7.1f} MiB")


if __name__ == "__main__":
    main()
