"""Does tuning beat the recipes and a random search? ``python benchmarks/tune_study.py --seed S --out FOLDER``.

On the testbed's checkpoint S, repairs are fitted on the split fit (plain requests and three attack families), searched
and chosen on the split validation by one rule, with optuna's TPE and at random, `--searches` times each, with the same
number of trials. Both start with nothing given, or, with `--starts`, both with the recipes "gated" and "paper". Every
chosen repair, and both recipes as they are, are then measured on the split test, once. Prints one table, and writes it
with all that it comes from; the studies in the folder are taken up by another run.
"""

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

from care_hf import CareForConditionalGeneration, tune_job
from care_hf.demo import ATTACK, BENIGN, pool, rate
from care_hf.recipe import RECIPES
from care_hf.testbed.measure import measure
from care_hf.testbed.suite import load_suite
from care_hf.tuned import Tuned, summary, told_recipe
from care_hf.tuning import STARTS
from care_hf.tuning_measures import Measured, Validation
from care_hf.tuning_solver import Solver

SAMPLERS = ("tpe", "random")
COLLECTED = ("turns.safetensors", "statistics.safetensors")
TEST_PROMPTS = 160  # in each cell
NEW = 12


def search(plan, sampler: str, seed: int, starts, out: Path, collected: Path) -> tuple[Tuned, float]:
    """One search; what was collected for another one is taken up, so that its time is that of its trials."""
    out.mkdir(parents=True, exist_ok=True)
    for name in COLLECTED:
        if not (out / name).exists():
            shutil.copy(collected / name, out / name)
    begun = time.monotonic()
    found = replace(plan, options={**plan.options, "sampler": sampler, "seed": seed, "starts": starts}).run(out)
    return found, time.monotonic() - begun


def row(name: str, validated: Measured, tested: dict) -> str:
    asr, refused, over = (
        pool(tested, ATTACK, "correct"),
        pool(tested, ATTACK, "refused"),
        pool(tested, BENIGN, "refused"),
    )
    right, plain = pool(tested, BENIGN, "correct"), rate(tested, "plain", "refused")
    cells = [
        f"{validated.success.percent} n={validated.success.n}",
        f"{validated.divergence.value:.2g}",
        f"{validated.over_refusal.count} of {validated.over_refusal.n}",
        f"{asr.percent} n={asr.n}",
        f"{refused.percent}",
        f"{plain.percent} n={plain.n}",
        f"{over.count} of {over.n}",
        f"{right.percent}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def table(rows: dict[str, tuple[Measured, dict]]) -> str:
    columns = ["validation: ASR", "divergence", "benign refused", "test: ASR", "attacks refused", "plain refused"]
    columns += ["benign refused", "benign right"]
    head = [f"| repair | {' | '.join(columns)} |", "| --- " + "| ---: " * len(columns) + "|"]
    return "\n".join([*head, *(row(name, *found) for name, found in rows.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="which checkpoint")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--searches", type=int, default=2, help="of each sampler, with seeds of their own")
    parser.add_argument("--no-refusal-limit", action="store_true", help="choose by attack success alone")
    parser.add_argument("--starts", action="store_true", help="begin with the recipes")
    parser.add_argument("--n", type=int, default=24, help="validation prompts of every set")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {"max_new_tokens": NEW, "batch_size": 64}
    limit = {"min_refusal": None} if arguments.no_refusal_limit else {}
    plan = tune_job.prepare("", (), None, arguments.seed, arguments.n, arguments.trials, **options, **limit)
    print(f"checkpoint {arguments.seed}, {plan.summary}", flush=True)
    begun = time.monotonic()
    solver = Solver(plan.model, plan.processor, plan.prompts, plan.space, plan.options["is_refusal"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    solver.collect(arguments.out)
    print(f"collected once: {time.monotonic() - begun:.0f} s", flush=True)

    asked = Validation(plan.model, plan.processor, plan.suite, plan.judge, 1.0, **options)
    repairs = {name: solver.solve(recipe) for name, recipe in RECIPES.items()}
    rows = {"undefended": (asked.undefended(), measure(plan.model, plan.processor, "test", TEST_PROMPTS))}
    told = {}
    searches: dict[str, Tuned] = {}
    for seed in range(arguments.searches):
        for sampler in SAMPLERS:
            name = f"{sampler} {seed}"
            starts = STARTS if arguments.starts else ()
            out = arguments.out / name.replace(" ", "")
            found, seconds = search(plan, sampler, seed, starts, out, arguments.out)
            searches[name], repairs[name] = found, found.subspaces
            states = [trial.state for trial in found.trials]
            told[name] = {state: states.count(state) for state in dict.fromkeys(states)} | {"seconds": round(seconds)}
            told[name] |= {"chosen": found.chosen.number, "kept": found.kept, "recipe": found.recipe.to_dict()}
            line = f"{name}: {told[name]['seconds']} s, trial {found.chosen.number}: {told_recipe(found.recipe)}"
            print(line, flush=True)
    tests = [case for cases in load_suite("test", TEST_PROMPTS).sets.values() for case in cases]
    for found in searches.values():
        found.check_unseen(tests)
    for name, subspaces in repairs.items():
        repaired = CareForConditionalGeneration.from_base(plan.model, subspaces)
        rows[name] = asked.measure(repaired, 0), measure(repaired, plan.processor, "test", TEST_PROMPTS)
    print(f"\n{plan.rule}\n\n{table(rows)}")
    kept = {
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "rule": str(plan.rule),
        "searches": told,
        "rows": {name: {"validation": summary(v), "test": t} for name, (v, t) in rows.items()},
    }
    (arguments.out / "study.json").write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
