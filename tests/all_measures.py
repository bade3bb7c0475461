"""Fit, diagnose and evaluate once over, for models that lie in several places; ``all_measures.py MODEL FOLDER`` does so
in every process with the model shared out by tensors.

What comes out goes to FOLDER, in one file for each process.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

import care_hf
from care_hf import measuring
from care_hf.budget import Budget
from care_hf.defences import Repair
from care_hf.judges import StrictJudge
from care_hf.recipe import Recipe
from care_hf.testbed import World
from care_hf.testbed.prompts import fit_prompts
from care_hf.testbed.suite import load_suite
from care_hf.testbed.world import REFUSAL

JUDGE = StrictJudge(REFUSAL)


def fitted(model, processor, **files):
    """The subspaces of both recipes."""
    many = fit_prompts(World(), 16)
    few = {name: items if name == "malicious" else items[:: len(items) // 24] for name, items in many.items()}
    two = fit_prompts(World(), 5, ["typographic", "icon"], exposure=False)
    prompts = {"gated": few, "paper": {name: items[:29] for name, items in two.items()}}
    found = {}
    for name, given in prompts.items():
        recipe = Recipe.load(name).replace(rank=4, batch_size=8)
        kept = {"resume": Path(files["folder"]) / f"{name}.kept"} if files else {}
        repaired = care_hf.fit(model, processor=processor, recipe=recipe, **kept, **given)
        found[name] = care_hf.SafetySubspaces.from_model(repaired)
    return found


def diagnosed(model, processor):
    """Which places carry refusal."""
    suite = load_suite("validation", 2)
    malicious = [*suite.harmful, *(case for cases in suite.attacks.values() for case in cases)]
    benign = [case for cases in suite.benign.values() for case in cases]
    options = {"components": ("ffn",), "layers": [3], "max_new_tokens": 12, "top_neurons": 2}
    found = care_hf.diagnose(model, malicious, benign, processor, JUDGE, **options)
    return {"left out": found.left_out, "trace": found.trace, "mediation": found.mediation, "neurons": found.neurons}


def evaluated(model, processor, subspaces):
    """Answers, verdicts and divergences, without and with a repair."""
    suite = load_suite("validation", 4)
    some = {"attacks": {"wrapper": suite.attacks["wrapper"]}, "benign": {"count": suite.benign["count"]}}
    measuring.ROUNDS = 1
    report = care_hf.evaluate(
        model,
        replace(suite, **some, pictured={}, corpus=()),
        {"gated": Repair(subspaces)},
        JUDGE,
        Budget(max_new_tokens=12, gradient_cases=0, universal_cases=0),
        processor=processor,
    )
    return {name: (of["sets"], of["divergence"]) for name, of in report.results.items()}


def all_of(model, processor, **files):
    """What all three find, as plain values and tensors."""
    fits = fitted(model, processor, **files)
    told = {
        name: {
            "tensors": subspaces.content()[0],
            "told": {part: subspaces.metadata.get(part) for part in ("prompts", "data")},
        }
        for name, subspaces in fits.items()
    }
    return {
        "fits": told,
        "diagnosis": diagnosed(model, processor),
        "evaluation": evaluated(model, processor, fits["gated"]),
    }


def main(source, folder):
    """All of it on a model that is shared out by tensors."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    config = DistributedConfig(tp_size=distributed.get_world_size())
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float64, distributed_config=config).eval()
    found = all_of(model, AutoProcessor.from_pretrained(source), folder=folder)
    held = {name: p.to_local().numel() / p.numel() for name, p in model.named_parameters() if hasattr(p, "to_local")}
    torch.save({**found, "held": held}, Path(folder) / f"{os.environ['RANK']}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
