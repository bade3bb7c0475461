"""Train the defences of a comparison from one set of prompts, each by a short specification."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol

from .answers import generate_answers
from .baselines import gated_mean_difference, gated_random, mean_difference
from .defences import CannedRefusal, Defence, FineTuned, Repair, Steered, Undefended
from .fitting import collect, collect_turns, prompt_scope
from .preference_steering import train_preference_steering
from .recipe import AUTO, Recipe
from .rivals import AstraSteering, astra_calibration, astra_vector, train_refusal_lora
from .samples import Sample, load_samples
from .settings_files import check_fields, check_types, meant
from .sites import Site
from .steering_vectors import SteeringVectors
from .subspace import SafetySubspaces, random_like
from .turn_repair import solve_turns


class TrainingPrompts(Protocol):
    """Where the prompts that defences are trained on come from; none of them may be in what is evaluated.

    Attributes:
        refusal: how the model refuses, for the rivals that are taught an answer.
    """

    refusal: str

    def prompts(self, families: Sequence[str], exposure: bool) -> dict[str, Sequence[Any]]:
        """Prompts by the argument of `care_hf.fit` that takes them.

        "malicious" are harmful requests in plain words and attacks of these families; "exposed" and "neutral" are
        there if `exposure`.
        """
        ...

    def is_refusal(self, answer: str) -> bool:
        """Whether the model refuses with `answer`."""
        ...


@dataclass(frozen=True)
class Specification:
    """How one defence of a comparison is made.

    Attributes:
        kind: one of `KINDS`.
        recipe: a recipe's name, for repairs and what is derived from them.
        changes: fields of that recipe that differ.
        families: the attack families that it is trained on.
        exposure: whether it is trained on exposed and neutral prompts, too.
        options: further arguments of a rival's training.
        adaptive: whether gradient attacks go through it.

    Raises:
        TypeError, ValueError: no such kind or recipe, a field that it does not have, or a value that does not fit.
    """

    kind: str
    recipe: str = "gated"
    changes: Mapping[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = ()
    exposure: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    adaptive: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"kind={self.kind!r} is not a defence; choose one of {tuple(KINDS)}.{meant(self.kind, KINDS)}"
            )
        if isinstance(self.families, list):
            object.__setattr__(self, "families", tuple(self.families))
        check_types(self)
        check_fields(self.changes, [item.name for item in fields(Recipe)], "changes of the recipe")
        if self.full_recipe.sites == AUTO:
            raise ValueError(f"sites={AUTO!r} needs a diagnosis, which a comparison does not have; name the sites.")
        if not self.full_recipe.by_turn and self.kind in ("ungated", "canned refusal"):
            raise ValueError(f"kind={self.kind!r} needs a recipe with a gate, which {self.recipe!r} has not.")
        if self.adaptive and self.kind == "canned refusal":
            raise ValueError(f"adaptive={self.adaptive}: no gradient goes through a canned refusal; leave it out.")

    @cached_property
    def full_recipe(self) -> Recipe:
        """The recipe with its changes."""
        return Recipe.load(self.recipe).replace(**self.changes)

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values, from which the defence could be trained again."""
        plain = {"kind": self.kind, "recipe": self.full_recipe.to_dict(), "families": list(self.families)}
        return {**plain, "exposure": self.exposure, "options": dict(self.options)}


class Trainer:
    """Trains defences on one model; what several of them are solved from is collected once.

    Args:
        model: the undefended model; stays as it is.
        processor: its processor.
        data: the prompts.
        batch_size: prompts per forward.
        seed: of whatever is drawn at random.
    """

    def __init__(self, model, processor, data: TrainingPrompts, batch_size: int = 32, seed: int = 0):
        self.model, self.processor, self.data = model, processor, data
        self.batch_size, self.seed = batch_size, seed
        self._collected: dict[str, Any] = {}

    def train(self, specification: Specification) -> Defence:
        """The defence of `specification`."""
        return KINDS[specification.kind](self, specification)

    def recipe(self, specification: Specification) -> Recipe:
        """Its recipe, with the trainer's batch size and seed."""
        return specification.full_recipe.replace(batch_size=self.batch_size, seed=self.seed)

    def prompts(self, specification: Specification) -> dict[str, Sequence[Any]]:
        """Its prompts."""
        return self.data.prompts(specification.families, specification.exposure)

    def prompts_digest(self, specification: Specification) -> str:
        """A hash of its prompts: what was measured of a defence trained on others is not its own."""
        key = repr(("digest", specification.families, specification.exposure))
        if key not in self._collected:
            found = {name: load_samples(items, name).digests for name, items in self.prompts(specification).items()}
            self._collected[key] = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
        return self._collected[key]

    def turns(self, specification: Specification):
        """What a gated recipe is solved from."""
        recipe = self.recipe(specification)
        sites = recipe.find_sites(self.model), recipe.gate_site(self.model), recipe.scope, recipe.steps
        key = repr(("turns", specification.families, specification.exposure, sites))
        if key not in self._collected:
            prompts, judge = self.prompts(specification), self.data.is_refusal
            self._collected[key] = collect_turns(
                self.model, processor=self.processor, recipe=recipe, judge=judge, **prompts
            )
        return self._collected[key]

    def statistics(self, specification: Specification):
        """What a recipe without a gate is solved from."""
        recipe = self.recipe(specification)
        prompts = self.data.prompts(specification.families, False)
        return collect(self.model, prompts["benign"], prompts["malicious"], self.processor, recipe)

    def subspaces(self, specification: Specification) -> SafetySubspaces:
        """The repair of its recipe."""
        recipe = self.recipe(specification)
        if recipe.by_turn:
            return solve_turns(self.turns(specification), recipe)
        solved = self.statistics(specification).solve(recipe)
        return replace(solved, **prompt_scope(self.model, self.processor, recipe))

    def answered(self, prompts: Sequence[Any], max_new_tokens: int) -> list[tuple[Sample, str]]:
        """Prompts with the model's own answers."""
        samples = list(load_samples(prompts, "prompts"))
        answers = generate_answers(self.model, self.processor, samples, max_new_tokens, self.batch_size)
        return list(zip(samples, answers, strict=True))


def _undefended(trainer: Trainer, specification: Specification) -> Defence:
    return Undefended(specification.settings)


def _repair(trainer: Trainer, specification: Specification) -> Defence:
    return Repair(trainer.subspaces(specification), specification.settings)


def _ungated(trainer: Trainer, specification: Specification) -> Defence:
    subspaces = trainer.subspaces(specification)
    return Repair(replace(subspaces, gate=subspaces.gate.ungated()), specification.settings)


def _random(trainer: Trainer, specification: Specification) -> Defence:
    subspaces = trainer.subspaces(specification)
    if trainer.recipe(specification).by_turn:
        return Repair(gated_random(trainer.turns(specification), subspaces, trainer.seed), specification.settings)
    return Repair(random_like(subspaces, trainer.seed), specification.settings)


def _mean_difference(trainer: Trainer, specification: Specification) -> Defence:
    recipe = trainer.recipe(specification)
    if recipe.by_turn:
        turns = trainer.turns(specification)
        return Repair(gated_mean_difference(turns, trainer.subspaces(specification)), specification.settings)
    solved = mean_difference(trainer.statistics(specification), recipe)
    confined = replace(solved, **prompt_scope(trainer.model, trainer.processor, recipe))
    return Repair(confined, specification.settings)


def _canned(trainer: Trainer, specification: Specification) -> Defence:
    return CannedRefusal(trainer.subspaces(specification), trainer.data.refusal, specification.settings)


def _astra(trainer: Trainer, specification: Specification) -> Defence:
    options = dict(specification.options)
    site, alpha = Site.parse(options.pop("site")), options.pop("alpha", 5.0)
    images, max_new_tokens = options.pop("images", 16), options.pop("max_new_tokens", 64)
    attacks, benign = (
        [sample for sample in load_samples(trainer.prompts(specification)[name], name) if len(sample.images) == 1]
        for name in ("malicious", "benign")
    )
    if not attacks or not benign:
        raise ValueError("ASTRA needs attacks and benign prompts with one image each; name families that have images.")
    attacks, benign = _spread(attacks, images), _spread(benign, images)
    model, processor = trainer.model, trainer.processor
    vector = astra_vector(model, processor, attacks, site, seed=trainer.seed, **options)
    h0 = astra_calibration(model, processor, benign, site, text=options.get("text"), max_new_tokens=max_new_tokens)
    return Steered(lambda m: AstraSteering(m, site, vector, h0, alpha), specification.settings)


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, evenly from all, so that every family and concept is among them; all if there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _pairs(trainer: Trainer, specification: Specification) -> tuple[list, list, int]:
    """Malicious prompts with the model's answers, all others with theirs, and how long answers may be."""
    max_new_tokens = specification.options.get("max_new_tokens", 64)
    prompts = trainer.prompts(specification)
    kept = [prompt for name, items in prompts.items() if name not in ("malicious", "refused") for prompt in items]
    malicious = trainer.answered([*prompts["malicious"], *prompts.get("refused", ())], max_new_tokens)
    return malicious, trainer.answered(kept, max_new_tokens)


def _training(specification: Specification, **defaults: Any) -> dict[str, Any]:
    options = {name: value for name, value in specification.options.items() if name != "max_new_tokens"}
    return {**defaults, **options}


def _lora(trainer: Trainer, specification: Specification) -> Defence:
    malicious, kept = _pairs(trainer, specification)
    refused = [(sample, trainer.data.refusal) for sample, _ in malicious]
    options = _training(specification, steps=100, rank=8, lr=1e-3)
    tuned = train_refusal_lora(trainer.model, trainer.processor, refused, kept, seed=trainer.seed, **options)
    return FineTuned(tuned, specification.settings)


def _spo(trainer: Trainer, specification: Specification) -> Defence:
    malicious, kept = _pairs(trainer, specification)
    complied = [
        (sample, trainer.data.refusal, answer) for sample, answer in malicious if not trainer.data.is_refusal(answer)
    ]
    if not complied:
        raise ValueError(
            "The model complies with no malicious prompt, so there is nothing to disprefer; name attack families."
        )
    options = _training(specification)
    steering = train_preference_steering(trainer.model, trainer.processor, complied, kept, seed=trainer.seed, **options)
    return Steered(lambda m: SteeringVectors(m, steering.vectors), specification.settings)


KINDS: dict[str, Callable[[Trainer, Specification], Defence]] = {
    "undefended": _undefended,
    "repair": _repair,
    "ungated": _ungated,
    "random": _random,
    "mean difference": _mean_difference,
    "canned refusal": _canned,
    "astra": _astra,
    "spo-style": _spo,
    "refusal lora": _lora,
}
