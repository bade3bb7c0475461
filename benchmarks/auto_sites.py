"""Does ``sites="auto"`` beat a site chosen at random? ``python benchmarks/auto_sites.py --seed S``.

The testbed's checkpoint is diagnosed on the split fit (plain requests that it refuses beside split, typographic and
icon attacks that it complies with), `site_choice.choose_site` chooses; then a gated repair is fitted at every place
after the gate, on the same split, and each is measured on the split validation. The test split is not touched. Prints
one row per place, the chosen one marked, and the mean over places, which is what a random choice is worth.
"""

import argparse
from dataclasses import replace

from transformers.utils import logging

from care_hf import CareForConditionalGeneration, Recipe, load_testbed
from care_hf.answers import generate_answers
from care_hf.fitting import collect_turns
from care_hf.judges import StrictJudge
from care_hf.mediation import mediate, pair_prompts
from care_hf.rates import Rate
from care_hf.site_choice import CHANGED, choose_site
from care_hf.sites import COMPONENTS, Site, decoder_layers, runs_before
from care_hf.testbed import World
from care_hf.testbed.prompts import fit_prompts
from care_hf.testbed.suite import as_case, load_suite
from care_hf.testbed.world import REFUSAL
from care_hf.turn_repair import solve_turns

SEEN = ("split", "typographic", "icon")
NEW, JUDGE = 12, StrictJudge(REFUSAL)


def answered(model, processor, cases, verdict: str) -> list:
    verdicts = JUDGE.verdicts(cases, generate_answers(model, processor, cases, NEW))
    return [case for case, said in zip(cases, verdicts, strict=True) if said == verdict]


def measure(model, processor, suite) -> dict[str, Rate]:
    attacks = [case for cases in suite.attacks.values() for case in cases]
    benign = [case for cases in suite.benign.values() for case in cases]
    of_attacks, of_benign = (
        JUDGE.verdicts(cases, generate_answers(model, processor, cases, NEW)) for cases in (attacks, benign)
    )
    return {
        "attacks complied": Rate(of_attacks.count("complied"), len(of_attacks)),
        "attacks refused": Rate(of_attacks.count("refused"), len(of_attacks)),
        "benign right": Rate(of_benign.count("complied"), len(of_benign)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gate-layer", type=int, default=None, help="the recipe's own unless told")
    parser.add_argument("--n", type=int, default=48, help="validation prompts of every set")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, processor = load_testbed(arguments.seed)
    world, recipe = World(), Recipe(batch_size=32)
    recipe = recipe if arguments.gate_layer is None else recipe.replace(gate_layer=arguments.gate_layer)
    gate = recipe.gate_site(model) if arguments.gate_layer is None else Site(arguments.gate_layer, "residual")
    every = [Site(layer, component) for layer in range(len(decoder_layers(model))) for component in COMPONENTS]
    places = [site for site in every if runs_before(gate, site)]

    refused = answered(model, processor, [as_case(s) for s in world.plain("fit", 96)], "refused")
    attacks = [as_case(s) for family in SEEN for s in world.attack(family, "fit", 64)][::2]
    pairs = pair_prompts(refused, answered(model, processor, attacks, "complied"))
    mediation = mediate(model, processor, *pairs, max_new_tokens=NEW, batch_size=32)
    chosen = choose_site(mediation, gate)

    prompts = fit_prompts(world, 96, SEEN)
    turns = collect_turns(model, processor=processor, recipe=recipe.replace(sites=tuple(map(str, places))), **prompts)
    suite = load_suite("validation", arguments.n)
    print(
        f"seed {arguments.seed}, gate at {gate}, {len(pairs[0])} pairs; validation, {arguments.n} prompts of each set"
    )
    print("undefended", *(f"{name} {rate}" for name, rate in measure(model, processor, suite).items()), sep="  ")
    found = {}
    for site in places:
        own = replace(turns, repaired={site: turns.repaired[site]})
        repaired = CareForConditionalGeneration.from_base(model, solve_turns(own, recipe.replace(sites=(str(site),))))
        found[site] = measure(repaired, processor, suite)
        effect = sum(mediation.indirect(site, group).value for group in CHANGED)
        mark = "  <- auto" if site == chosen else ""
        print(f"{site!s:12s} indirect {effect:6.2f}", *(f"{k} {v}" for k, v in found[site].items()), mark, sep="  ")
    for name in next(iter(found.values())):
        values = [rates[name].value for rates in found.values()]
        worth = sum(values) / len(values)
        print(f"{name}: auto {found[chosen][name].value:.3f}, mean over {len(values)} places {worth:.3f}")


if __name__ == "__main__":
    main()
