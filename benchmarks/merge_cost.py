"""What a mergeable repair costs on the testbed: the gated and the printed repair, and what of them can be merged.

``python benchmarks/merge_cost.py --seed 0`` fits the gated and the printed repair, switches the printed one to every
setting that can be merged (`care_hf.cost_of_switching`), merges those, and measures the merged checkpoints, loaded by
the stock class.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

import care_hf
from care_hf import CareForConditionalGeneration
from care_hf.demo import ATTACK, BENIGN, fit_repairs, pool
from care_hf.merge_check import token_logits
from care_hf.samples import Sample, collate
from care_hf.sites import image_token_ids
from care_hf.switching import alternatives, compare, cost_of_switching
from care_hf.testbed import World, load_testbed
from care_hf.testbed.measure import measure
from care_hf.testbed.world import ATTACKS, BENIGN_TASKS


def prompts(model, processor, n: int) -> dict[str, list[dict]]:
    """Model inputs of validation prompts, a batch per attack family and per benign task."""
    world = World()
    sets = {
        "attacks": [world.attack(family, "validation", n) for family in ATTACKS],
        "benign": [world.benign(task, "validation", n) for task in BENIGN_TASKS],
    }
    ids = image_token_ids(model.config)
    return {
        name: [dict(collate(processor, [Sample(s.messages) for s in batch], ids).inputs) for batch in batches]
        for name, batches in sets.items()
    }


def row(name: str, model, processor, n: int) -> str:
    counts = measure(model, processor, "test", n)
    shares = [pool(counts, ATTACK, "correct"), pool(counts, ATTACK, "refused"), pool(counts, BENIGN, "correct")]
    refused = pool(counts, BENIGN, "refused")
    return f"| {name} | " + " | ".join(share.percent for share in shares) + f" | {refused.count} of {refused.n} |"


@torch.no_grad()
def main(seed: int, n: int) -> None:
    model, processor = load_testbed(seed)
    subspaces = fit_repairs(model, processor, lambda line: None)
    gated, printed = (CareForConditionalGeneration.from_base(model, subspaces[k]) for k in ("gated", "paper"))
    inputs = prompts(model, processor, 16)
    print(f"Testbed, seed {seed}. Divergence of the next token's distribution from the repair as it is:\n")
    print("| from | to | on | nats per token | same next token | tokens |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for name, batches in inputs.items():
        for setting, cost in cost_of_switching(printed, batches).items():
            print(f"| printed | {setting} | {name} | {cost.divergence:.2g} | {cost.agreement:.1%} | {cost.tokens} |")
        cost = compare(token_logits(gated, batches), token_logits(printed, batches))
        print(f"| gated | printed | {name} | {cost.divergence:.2g} | {cost.agreement:.1%} | {cost.tokens} |")
    print(f"\n{n} test prompts per set; those named merged are loaded by the stock class from what `merge` wrote:\n")
    print("| model | ASR | attacks refused | benign right | benign refused |\n| --- | ---: | ---: | ---: | ---: |")
    for name, each in (("undefended", model), ("gated", gated), ("printed", printed)):
        print(row(name, each, processor, n))
    for setting, other in alternatives(printed).items():
        repaired = CareForConditionalGeneration.from_base(model, other)
        with tempfile.TemporaryDirectory() as folder:
            merged = care_hf.merge(repaired, Path(folder) / "merged", inputs=inputs["attacks"])
            stock = AutoModelForImageTextToText.from_pretrained(merged.path, dtype=torch.float32)
            print(row(f"printed, {setting}, merged ({merged.difference:.1g})", stock.eval(), processor, n), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=160)
    arguments = parser.parse_args()
    main(arguments.seed, arguments.n)
