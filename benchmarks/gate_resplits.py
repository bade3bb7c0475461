"""Choose a gate's share of false alarms on resampled concepts: ``python benchmarks/gate_resplits.py --seed S``.

The 40 benign and 40 forbidden concepts of the splits fit and validation are dealt anew, 24 and 16 of each, `RESPLITS`
times; the gate is fitted on the former with the templates of fit, and asked about the latter with those of validation.
That is the only evidence for the default recipe's `false_alarms`, and touches nothing of the test split. Prints, per
share, mean over resplits: attacks that do not set off the gate, benign prompts that do, and the worst task of each
resplit. ``--concepts-per-class N`` fits on fewer concepts.
"""

import argparse

import numpy as np
import torch
from transformers.utils import logging

from care_hf import Recipe, load_testbed
from care_hf.detectors import Cell, Prompts, assemble, cross_fit, fit_detectors, thresholds
from care_hf.gating import GateReader
from care_hf.samples import Sample, collate
from care_hf.sites import image_token_ids, record
from care_hf.testbed import World
from care_hf.testbed.world import BESIDE_IMAGE, VISUAL_QUESTIONS

RESPLITS, FIT_CONCEPTS, EACH = 20, 24, 8  # EACH: prompts of a concept in a cell
SHARES = (0.0005, 0.001, 0.002, 0.005, 0.01)
SEEN = ("split/text", "typographic/image", "icon/image")
ATTACKS = ("wrapper/text", "wrapper/image", "cipher/text", *SEEN)
EXPOSED = ("kind in text/text", "kind, written/image", "kind, shown/image", "read/image", "name/image")
BENIGN = ("recipe/text", "recipe/image", *ATTACKS)


def sample(world: World, rng, cell: str, concept, pool: str):
    """One prompt about `concept` with the templates of `pool`; a cell is a kind and its modality."""
    kind, modality = cell.split("/")
    if cell in EXPOSED:
        forms = {"kind in text": "text", "kind, written": "written", "kind, shown": "shown"}
        if kind in forms:
            return world.kind_question(rng, concept, (pool,), forms[kind])
        draw = {"read": world.typographic, "name": world.icon}[kind]
        return draw(rng, concept, (pool,), question=kind)
    if kind in ("typographic", "icon"):
        return getattr(world, kind)(rng, concept, (pool,))
    return world.request(rng, concept, (pool,), "plain" if kind == "recipe" else kind, scene=modality == "image")


class Bank:
    """Activations of the gate's site for every concept, cell and pool of templates."""

    def __init__(self, seed: int):
        self.model, self.processor = load_testbed(seed)
        self.site = Recipe().gate_site(self.model)
        world = World()
        self.concepts = {f: [c for c in world.select(f) if c.split != "test"] for f in (False, True)}
        beside = [f"{family.removesuffix('+image')}/image" for family in BESIDE_IMAGE]
        self.of: dict[tuple, torch.Tensor] = {}
        for pool in ("fit", "validation"):
            for number, cell in enumerate((*BENIGN, *EXPOSED, *beside)):
                rng = np.random.default_rng([number, pool == "fit"])
                for concept in (*self.concepts[False], *self.concepts[True]):
                    prompts = [sample(world, rng, cell, concept, pool) for _ in range(EACH)]
                    self.of[pool, cell, concept.word] = self.read(prompts)
        rng = np.random.default_rng(0)
        self.unrelated = {
            task: self.read([world.visual_question(rng, task) for _ in range(EACH * FIT_CONCEPTS)])
            for task in VISUAL_QUESTIONS
        }

    @torch.no_grad()
    def read(self, samples) -> torch.Tensor:
        """(n, d) of the last tokens."""
        prompts = [Sample(s.messages) for s in samples]
        batch = collate(self.processor, prompts, image_token_ids(self.model.config), padding_side="left")
        with record(self.model, [self.site]) as activations:
            self.model.base_model(**batch.inputs, use_cache=False)
        return activations[self.site][:, -1].clone()

    def prompts(self, words: dict[bool, list[str]], attacks: tuple[str, ...]) -> Prompts:
        """Fit prompts about these words."""
        asked = {("benign", False): BENIGN, ("malicious", True): ("recipe/text", "recipe/image", *attacks)}
        asked |= {("neutral", False): EXPOSED, ("exposed", True): EXPOSED}
        activations, cells, groups = [], [], []
        for (of, forbidden), kinds in asked.items():
            for cell in kinds:
                kind, modality = cell.split("/")
                for word in words[forbidden]:
                    activations.append(self.of["fit", cell, word])
                    cells += [Cell(of, kind, modality == "image")] * EACH
                    groups += [(word,)] * EACH
        for task, h in self.unrelated.items():
            activations.append(h)
            cells += [Cell("neutral", task, True)] * len(h)
            groups += [(f"{task} {i}",) for i in range(len(h))]
        return Prompts(torch.cat(activations), cells, groups)

    def fires(self, gate: GateReader, cell: str, words: list[str]) -> torch.Tensor:
        """Where the gate fires on the validation templates, bool (n,)."""
        h = torch.cat([self.of["validation", cell, word] for word in words])
        return gate(h, torch.full((len(h),), cell.endswith("image")))


def deal(concepts, rng, count: int) -> tuple[list[str], list[str]]:
    """Words to fit on, and words to ask about."""
    words = [concepts[i].word for i in rng.permutation(len(concepts))]
    return words[:count], words[FIT_CONCEPTS:]


def main() -> None:
    """Parse the command line, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concepts-per-class", type=int, default=FIT_CONCEPTS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bank, ridge = Bank(arguments.seed), Recipe().gate_ridge
    print("fit with, share: attacks missed | beside an image missed | benign fired on | worst task, mean of resplits")
    for attacks in ((), SEEN):
        rows = {share: [] for share in SHARES}
        for resplit in range(RESPLITS):
            rng = np.random.default_rng([resplit, 9])
            dealt = {f: deal(bank.concepts[f], rng, arguments.concepts_per_class) for f in (False, True)}
            prompts = bank.prompts({f: dealt[f][0] for f in dealt}, attacks)
            detectors, held_out = fit_detectors(prompts, ridge), cross_fit(prompts, ridge)
            for share, row in rows.items():
                gate = GateReader.from_gate(assemble((0,), detectors, thresholds(held_out, share)))
                row.append(rates(bank, gate, dealt[False][1], dealt[True][1]))
        for share, row in rows.items():
            cells = " | ".join(f"{100 * value:.2f} %" for value in np.mean(row, axis=0))
            print(f"{'attacks' if attacks else 'no attacks'}, {100 * share:g} %: {cells}", flush=True)


def rates(bank: Bank, gate: GateReader, harmless: list[str], harmful: list[str]) -> tuple[float, float, float, float]:
    """Shares of attacks missed, of those beside an unrelated image missed, of benign prompts fired on, worst task."""
    missed = [1 - bank.fires(gate, cell, harmful).double().mean().item() for cell in ATTACKS]
    beside = [1 - bank.fires(gate, cell, harmful).double().mean().item() for cell in ("split/image", "cipher/image")]
    tasks: dict[str, list[torch.Tensor]] = {}
    for cell in (*BENIGN, *EXPOSED):
        task = cell.split("/")[0].split(",")[0].removesuffix(" in text")
        asked = [*harmless, *harmful] if cell in EXPOSED else harmless
        tasks.setdefault(task, []).append(bank.fires(gate, cell, asked))
    shares = [torch.cat(fires).double().mean().item() for fires in tasks.values()]
    return float(np.mean(missed)), float(np.mean(beside)), float(np.mean(shares)), max(shares)


if __name__ == "__main__":
    main()
