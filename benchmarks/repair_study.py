"""Measure the gated repair on a testbed checkpoint beside its controls: tables and transfer.

``python benchmarks/repair_study.py PART --seed 0 --split validation --out FOLDER``, PART being one of

- ``table``: every defence on every attack family and benign task; ``brief``: some of them;
- ``benign``: over-refusal alone, for a larger ``--n``;
- ``transfer``: each attack family left out of the fit, with and without exposed prompts.

``--checkpoint FOLDER --cue none`` or ``--harm meaningful`` measures a checkpoint of another world. Each part writes
JSON into the folder, and skips what is there already.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from care_hf import CareForConditionalGeneration, Recipe, load_testbed
from care_hf.answers import gate_fires, generate_answers
from care_hf.baselines import gated_mean_difference, gated_random
from care_hf.fitting import collect, collect_turns
from care_hf.rivals import AstraSteering, astra_calibration, astra_vector, train_refusal_lora
from care_hf.samples import Sample
from care_hf.testbed import World
from care_hf.testbed.judging import VERDICTS, judge, refuses
from care_hf.testbed.measure import MAX_NEW_TOKENS, measure
from care_hf.testbed.prompts import fit_prompts
from care_hf.testbed.world import ATTACKS, BENIGN_TASKS, BESIDE_IMAGE, REFUSAL
from care_hf.turn_repair import solve_turns

SEEN = ("split", "typographic", "icon")  # the families that a fit "with attacks" knows
FIT_PROMPTS = 192  # of each kind
TEST_PROMPTS = 160  # in each cell
FALSE_ALARMS = (0.0005, 0.001, 0.005, 0.01)  # beside the recipe's own
ASTRA_ALPHA = 1.0
RECIPE = Recipe(batch_size=64)


class Study:
    """One checkpoint, its world, and what was collected on it."""

    def __init__(self, arguments):
        self.world, self.split, self.out = World(0, arguments.cue, arguments.harm), arguments.split, arguments.out
        self.n = arguments.n
        if arguments.checkpoint:
            model = LlavaForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=torch.float32)
            self.model, self.processor = model.eval(), LlavaProcessor.from_pretrained(arguments.checkpoint)
        else:
            self.model, self.processor = load_testbed(arguments.seed)
        self.out.mkdir(parents=True, exist_ok=True)

    def turns(self, families=(), exposure=True):
        """Fit prompts with these attack families, recorded."""
        prompts = fit_prompts(self.world, FIT_PROMPTS, families, exposure=exposure)
        return collect_turns(self.model, processor=self.processor, recipe=RECIPE, judge=refuses, **prompts)

    def repaired(self, subspaces) -> CareForConditionalGeneration:
        """The checkpoint with a repair."""
        return CareForConditionalGeneration.from_base(self.model, subspaces)

    def counts(self, model, attacks=ATTACKS, tasks=BENIGN_TASKS):
        """Verdicts on the split."""
        return measure(model, self.processor, self.split, self.n, self.world, attacks, tasks)

    def sets(self) -> dict:
        """What `counts` measures."""
        sets = {f"attack/{family}": self.world.attack(family, self.split, self.n) for family in ATTACKS}
        sets["plain"] = self.world.plain(self.split, self.n)
        return sets | {f"benign/{task}": self.world.benign(task, self.split, self.n) for task in BENIGN_TASKS}

    def keep(self, name: str, make) -> None:
        """Write what `make` gives, unless it is there."""
        path = self.out / f"{name}.json"
        if path.exists():
            return
        start = time.monotonic()
        result = make()
        path.write_text(json.dumps(result, indent=1))
        print(f"{path}: {time.monotonic() - start:.0f} s", flush=True)


def brief(study: Study) -> None:
    """The gated repair, with and without attacks in its fit, and the detector alone."""
    gated = {"gated, no attacks": solve_turns(study.turns(), RECIPE), "gated": solve_turns(study.turns(SEEN), RECIPE)}
    measure_gated(study, gated)


def benign(study: Study) -> None:
    """Benign tasks alone, on which refusals are too rare for the prompts of the table to count."""
    for name, families in (("gated, no attacks", ()), ("gated", SEEN)):
        repaired = study.repaired(solve_turns(study.turns(families), RECIPE))
        study.keep(f"benign {name}", lambda repaired=repaired: study.counts(repaired, ()))


def measure_gated(study: Study, gated: dict) -> None:
    """These repairs, and what their gates alone would have done."""
    study.keep("table undefended", lambda: study.counts(study.model))
    for name, subspaces in gated.items():
        study.keep(f"table {name}", lambda subspaces=subspaces: study.counts(study.repaired(subspaces)))
        study.keep(f"table detector + canned refusal ({name})", lambda subspaces=subspaces: canned(study, subspaces))


def points(study: Study, gated: dict) -> None:
    """The same gates at other shares of false alarms."""
    for name, turns in gated.items():
        for share in FALSE_ALARMS:
            subspaces = solve_turns(turns, RECIPE.replace(false_alarms=share))
            study.keep(f"point {name} {share}", lambda subspaces=subspaces: study.counts(study.repaired(subspaces)))


def table(study: Study) -> None:
    """Every defence on everything."""
    free, seen = study.turns(), study.turns(SEEN)
    gated = {"gated, no attacks": solve_turns(free, RECIPE), "gated": solve_turns(seen, RECIPE)}
    measure_gated(study, gated)
    one_line = solve_turns(study.turns(SEEN, exposure=False), RECIPE)
    every = solve_turns(study.turns(ATTACKS), RECIPE)
    fits = {**gated, "gated, all families": every, "gated, no exposed prompts": one_line}
    rows = {
        "gated, all families": every,
        "gated, no exposed prompts": one_line,
        "ungated": replace(gated["gated"], gate=gated["gated"].gate.ungated()),
        "gate + random": gated_random(seen, gated["gated"]),
        "gate + mean difference": gated_mean_difference(seen, gated["gated"]),
        "gate + printed basis": solve_turns(
            seen, RECIPE.replace(basis="filter", anchor="benign", scope=("last", "response"))
        ),
        "gated, last token only": solve_turns(seen, RECIPE.replace(scope=("last",))),
    }
    for name, subspaces in rows.items():
        study.keep(f"table {name}", lambda subspaces=subspaces: study.counts(study.repaired(subspaces)))
    points(study, {"gated, no attacks": free, "gated": seen})
    study.keep("beside undefended", lambda: study.counts(study.model, BESIDE_IMAGE, ()))
    for name, subspaces in fits.items():
        study.keep(f"beside {name}", lambda s=subspaces: study.counts(study.repaired(s), BESIDE_IMAGE, ()))
    study.keep("table printed", lambda: study.counts(study.repaired(printed(study))))
    study.keep("calibration", lambda: {name: json.loads(s.metadata["calibration"]) for name, s in fits.items()})
    study.keep("table gate + ASTRA", lambda: astra(study, gated["gated"]))
    for name, families in (("LoRA, no attacks", ()), ("LoRA", SEEN)):
        study.keep(f"table {name}", lambda families=families: study.counts(lora(study, families)))


def printed(study: Study):
    """The printed method on the same prompts."""
    prompts = fit_prompts(study.world, FIT_PROMPTS, SEEN, exposure=False)
    recipe = Recipe.load("paper").replace(batch_size=64)
    return collect(study.model, prompts["benign"], prompts["malicious"], study.processor, recipe).solve(recipe)


def canned(study: Study, subspaces) -> dict:
    """The undefended model's verdicts, but refused wherever the gate fires."""
    gate, table = study.repaired(subspaces), {}
    for name, samples in study.sets().items():
        fires = gate_fires(gate, study.processor, samples).tolist()
        answers = generate_answers(study.model, study.processor, samples, MAX_NEW_TOKENS)
        verdicts = [
            judge(REFUSAL if fired else answer, sample)
            for fired, answer, sample in zip(fires, answers, samples, strict=True)
        ]
        table[name] = {verdict: verdicts.count(verdict) for verdict in VERDICTS} | {"fires": sum(fires)}
    return table


def astra(study: Study, subspaces) -> dict:
    """ASTRA's steering at the repaired site, at the tokens that the gate's repair would have changed."""
    repaired, site = study.repaired(subspaces), min(subspaces.sites)
    repaired.strength = 0
    attacks = [s for family in ("typographic", "icon") for s in study.world.attack(family, "fit", 24)]
    pictured = [s for task in ("typographic", "icon") for s in study.world.benign(task, "fit", 24)]
    vector = astra_vector(study.model, study.processor, attacks, site, target="step one", text=None)
    h0 = astra_calibration(study.model, study.processor, pictured, site, text=None, max_new_tokens=MAX_NEW_TOKENS)
    state = repaired.care_state
    with AstraSteering(repaired, site, vector, h0, ASTRA_ALPHA, active=lambda: state.now.held_steps[:, -1] >= 0):
        return study.counts(repaired)


def lora(study: Study, families):
    """Refusal-pair fine-tuning on the same prompts: malicious ones refused, all others answered as before."""
    prompts = {
        name: [Sample(prompt["messages"]) for prompt in items]
        for name, items in fit_prompts(study.world, FIT_PROMPTS, families).items()
    }
    kept = [sample for name, items in prompts.items() if name != "malicious" for sample in items]
    answers = generate_answers(study.model, study.processor, kept, MAX_NEW_TOKENS)
    refused = [(sample, REFUSAL) for sample in prompts["malicious"]]
    pairs = list(zip(kept, answers, strict=True))
    return train_refusal_lora(study.model, study.processor, refused, pairs, steps=100, rank=8, lr=1e-3)


def transfer(study: Study) -> None:
    """Strict ASR on each family when the fit knows all others, and over-refusal of that fit."""
    for exposure in (True, False):
        for left_out in ATTACKS:
            families = tuple(family for family in ATTACKS if family != left_out)
            # In wrapper+image and new font the attack is as in another family: leave that out, too.
            twins = {"wrapper": "wrapper+image", "typographic": "new font"}
            twins |= {value: key for key, value in twins.items()}
            families = tuple(f for f in families if f != twins.get(left_out))

            def make(families=families, left_out=left_out, exposure=exposure):
                repaired = study.repaired(solve_turns(study.turns(families, exposure), RECIPE))
                return study.counts(repaired, (left_out,), ("recipe", "typographic", "icon", "kind"))

            study.keep(f"transfer {left_out} {'with' if exposure else 'without'} exposed", make)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("table", "brief", "benign", "transfer"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--cue", default="shared", choices=("shared", "none"))
    parser.add_argument("--harm", default="neutral", choices=("neutral", "meaningful"))
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--n", type=int, default=TEST_PROMPTS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    {"table": table, "brief": brief, "benign": benign, "transfer": transfer}[arguments.part](Study(arguments))


if __name__ == "__main__":
    main()
