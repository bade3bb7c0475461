"""How a fit's cost grows with prompts, width, rank, layers and processes: ``python benchmarks/fit_scaling.py``.

Of a LLaVA of random weights, 12 decoder layers, under the recipe "paper": collecting, and solving, over the plain
forward of the same prompts, timed in turns in one run; one thing is varied at a time. Processes (gloo) have one thread
each, and so has then the forward, which one of them makes alone; they have the most prompts. ``--figure`` draws them.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import distributed, multiprocessing
from transformers import LlavaForConditionalGeneration
from transformers.utils import logging

from care_hf import load_testbed
from care_hf.fitting import collect
from care_hf.recipe import Recipe
from care_hf.samples import collate, load_samples
from care_hf.sites import image_token_ids
from care_hf.testbed import World
from care_hf.testbed.prompts import fit_prompts

DEPTH, BATCH = 12, 16
USUAL = {"prompts": 64, "width": 256, "rank": 8, "layers": 2}
VARIED = {"prompts": (32, 64, 128, 256), "width": (128, 256, 512), "rank": (2, 8, 32), "layers": (1, 2, 4, 8)}
PROCESSES = (1, 2)
COLUMNS = ("varied", "value", "forward s", "collect / forward", "solve / forward", "least to most")


def build(config, width: int) -> LlavaForConditionalGeneration:
    """A model of the testbed's kind, of another width and depth, its weights random."""
    config = copy.deepcopy(config)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = width, 3 * width, DEPTH
    text.num_attention_heads = text.num_key_value_heads = width // text.head_dim
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def forward(model, processor, prompts: dict) -> None:
    """All prompts, once, without the logits that a fit does not take either."""
    for samples in prompts.values():
        for start in range(0, len(samples), BATCH):
            part = samples[start : start + BATCH]
            inputs = collate(processor, part, image_token_ids(model.config), padding_side="right").inputs
            model.base_model(**inputs, use_cache=False)


def seconds(call: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def measure(processor, config, rounds: int, prompts: int, width: int, rank: int, layers: int) -> dict[str, str]:
    """The ratios of one setting, medians of rounds in which forward and fit take turns."""
    model = build(config, width)
    names = fit_prompts(World(), prompts // 2, ("icon",), exposure=False)
    chosen = {name: load_samples(names[name][-prompts:], name) for name in ("benign", "malicious")}
    first = DEPTH // 2 - layers // 2
    sites = tuple(f"{layer}.ffn" for layer in range(first, first + layers))
    recipe = Recipe.load("paper").replace(rank=rank, sites=sites, batch_size=BATCH)
    rows, several = [], distributed.is_initialized()
    for _ in range(rounds + 1):
        plain = 1.0
        if not several or distributed.get_rank() == 0:
            plain, _ = seconds(lambda: forward(model, processor, chosen))
        if several:
            distributed.barrier()
        collecting, statistics = seconds(lambda: collect(model, processor=processor, recipe=recipe, **chosen))
        solving, _ = seconds(lambda s=statistics: s.solve(recipe))
        rows.append((plain, collecting / plain, solving / plain))
    plain, collected, solved = zip(*rows[1:], strict=True)  # after one to warm up
    return {
        "forward s": f"{median(plain):.2f}",
        "collect / forward": f"{median(collected):.2f}",
        "solve / forward": f"{median(solved):.3f}",
        "least to most": f"{min(collected):.2f} to {max(collected):.2f}",
    }


def measure_together(rank: int, count: int, rounds: int, folder: str) -> None:
    """`measure` the most prompts in one of `count` processes; the first writes what it found to `folder`."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    testbed, processor = load_testbed()
    found = measure(processor, testbed.config, rounds, **{**USUAL, "prompts": VARIED["prompts"][-1]})
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def measure_processes(count: int, rounds: int) -> dict[str, str]:
    """`measure` in `count` processes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure_together, (count, rounds, folder), nprocs=count)
        return json.loads(Path(folder, "found.json").read_text())


def draw(rows: list[dict], path: Path) -> None:
    """Seconds of a fit against what is varied, both in steps of two; a dotted line grows in proportion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [*VARIED, "processes"]
    figure, axes = pyplot.subplots(1, len(names), figsize=(3 * len(names), 3), layout="constrained", sharey=True)
    for axis, name in zip(axes, names, strict=True):
        mine = [row for row in rows if row["varied"] == name]
        values, plain = [row["value"] for row in mine], [float(row["forward s"]) for row in mine]
        for label, style in (("collect / forward", "o-"), ("solve / forward", "s--")):
            cost = [t * float(row[label]) for t, row in zip(plain, mine, strict=True)]
            axis.plot(values, cost, style, color="black", label=label.split()[0])
        growth = [values[0] / v if name == "processes" else v / values[0] for v in values]
        axis.plot(values, [plain[0] * by for by in growth], ":", color="grey", label="in proportion")
        axis.set(xscale="log", yscale="log", xlabel=name, xticks=values, xticklabels=values)
        axis.minorticks_off()
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    testbed, processor = load_testbed()
    threads = torch.get_num_threads()
    print(
        f"CPU, {threads} threads; torch {torch.__version__}, transformers {transformers.__version__}; usual: {USUAL}\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    rows = []
    for name, values in {**VARIED, "processes": PROCESSES}.items():
        for value in values:
            if name == "processes":
                found = measure_processes(value, arguments.rounds)
            else:
                found = measure(processor, testbed.config, arguments.rounds, **{**USUAL, name: value})
            rows.append({"varied": name, "value": value, **found})
            print(f"| {' | '.join(str(rows[-1][column]) for column in COLUMNS)} |", flush=True)
    if arguments.figure:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    main()
