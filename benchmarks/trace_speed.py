"""What sharing the undisturbed run saves: ``python benchmarks/trace_speed.py --seed S``.

Times, in turns in one run, a full causal trace of the testbed (6 layers x layer, FFN, attention; mode "mean")

- shared: `care_hf.trace`;
- plain: the same with ``reuse=False``, one `generate` per block and batch, which also gives the first token's logits;
- naive: the loop that one would write: a hook, `generate_answers`, `next_token_log_probabilities`, for every block.

All three give the same answers (compared here), each traces the unblocked model as well. Prints medians and ratios.
"""

import argparse
import statistics
import time

import torch
from transformers.utils import logging

from care_hf import load_testbed
from care_hf.answers import generate_answers, next_token_log_probabilities
from care_hf.blocking import Blocker, collect_contributions
from care_hf.interventions import rewritten
from care_hf.judges import StrictJudge
from care_hf.testbed.suite import load_suite
from care_hf.testbed.world import REFUSAL
from care_hf.tracing import find_sites, trace

NEW, BATCH = 12, 16


def naive(model, processor, malicious, benign) -> dict[str, list[str]]:
    sites = find_sites(model, ("layer", "ffn", "attention"))
    contributions = collect_contributions(model, processor, benign, sites, BATCH)
    judge, cases, said = StrictJudge(REFUSAL), [*malicious, *benign], {}
    for site in [None, *sites]:
        if site is None:
            answers = generate_answers(model, processor, cases, NEW, BATCH)
            next_token_log_probabilities(model, processor, cases, BATCH)
        else:
            blocker = Blocker(site, "mean", contributions)
            with rewritten(model, site, blocker.rewrite):
                answers = generate_answers(model, processor, cases, NEW, BATCH)
                next_token_log_probabilities(model, processor, cases, BATCH)
        said[str(site)] = judge.verdicts(cases, answers)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=8, help="prompts of every set")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, processor = load_testbed(arguments.seed)
    suite = load_suite("validation", arguments.n)
    malicious = [*suite.harmful, *(case for cases in suite.attacks.values() for case in cases)]
    benign = [case for cases in suite.benign.values() for case in cases]
    options = {"judge": StrictJudge(REFUSAL), "max_new_tokens": NEW, "batch_size": BATCH}
    runs = {
        "shared": lambda: trace(model, processor, malicious, benign, **options),
        "plain": lambda: trace(model, processor, malicious, benign, reuse=False, **options),
        "naive": lambda: naive(model, processor, malicious, benign),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    found = {}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            found[name] = run()
            seconds[name].append(time.perf_counter() - start)
    assert found["shared"].table("mean") == found["plain"].table("mean")
    for site, outcome in found["shared"].blocked["mean"].items():
        assert [*outcome.malicious, *outcome.benign] == found["naive"][str(site)], site
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"seed {arguments.seed}, {len(malicious)} malicious and {len(benign)} benign prompts, {BATCH} per forward,")
    print(f"{NEW} new tokens, torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    for name, value in medians.items():
        print(f"{name:8s} {value:7.2f} s   shared / {name} {medians['shared'] / value:.3f}")


if __name__ == "__main__":
    main()
