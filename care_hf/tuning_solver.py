"""Everything that recipes of a search space are solved from, collected once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .fitting import Statistics, collect, collect_turns, prompt_scope
from .judges import is_refusal
from .recipe import Recipe
from .samples import Samples, load_samples
from .search_space import Space
from .search_values import MODALITY_FAMILY, TURN_FAMILY
from .sites import Site
from .subspace import SafetySubspaces
from .turn_repair import solve_turns
from .turns import Turns


class Solver:
    """Solves recipes of a space; a model's forwards are all in `collect`.

    Args:
        model: the base.
        processor: its processor.
        prompts: by the argument of `fit` that takes them: "benign" and "malicious", perhaps "exposed" and "neutral",
            "refused". The family "modality" takes neutral prompts as benign ones, and no exposed ones.
        space: what is searched; by default `Space.of(model)`; without its visual modality where no prompts have images.
        is_refusal: whether an answer is a refusal.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor,
        prompts: Mapping[str, Iterable[Any]],
        space: Space | None = None,
        is_refusal: Callable[[str], bool] = is_refusal,
    ):
        self.model, self.processor, self.is_refusal = model, processor, is_refusal
        self.prompts = {name: load_samples(data, name) for name, data in prompts.items()}
        pictured = all(self.prompts[name].pictured for name in ("benign", "malicious"))
        space = space or Space.of(model)
        self.space = space if pictured else space.of_text()
        self.turns: Turns | None = None
        self.statistics: Statistics | None = None

    @property
    def digests(self) -> set[str]:
        """Of all prompts."""
        return {digest for items in self.prompts.values() for digest in items.digests}

    def collect(self, folder: Path | None = None) -> None:
        """Run all prompts, once for each family; what is collected is kept in `folder`, and taken up from there.

        Raises:
            TypeError, ValueError, FloatingPointError: as `fitting.fit`.
        """
        if TURN_FAMILY in self.space.families:
            resume = folder and folder / "turns.safetensors"
            recipe = self._collecting(TURN_FAMILY)
            self.turns = collect_turns(
                self.model,
                processor=self.processor,
                recipe=recipe,
                judge=self.is_refusal,
                resume=resume,
                **self.prompts,
            )
        if MODALITY_FAMILY in self.space.families:
            resume = folder and folder / "statistics.safetensors"
            recipe = self._collecting(MODALITY_FAMILY)
            benign, malicious = by_modality(self.prompts)
            self.statistics = collect(self.model, benign, malicious, self.processor, recipe, resume=resume)

    def _collecting(self, family: str) -> Recipe:
        """A recipe at all places of a family, of the least rank."""
        sites = tuple(str(site) for site in self.space.sites(family))
        if family == TURN_FAMILY:
            return self.space.fixed.replace(sites=sites, gate_layer=min(self.space.gate_layers), rank=1)
        return self.space.fixed.replace(
            sites=sites, scope="all", basis="filter", anchor="benign", gate="none", gate_layer=0, rank=1
        )

    def solve(self, recipe: Recipe) -> SafetySubspaces:
        """The repair that `fit` would give with this recipe and these prompts.

        Raises:
            ValueError: the prompts do not suffice for the recipe.
        """
        sites = recipe.find_sites(self.model)
        if not recipe.by_turn:
            asked = prompt_scope(self.model, self.processor, recipe)
            return replace(self.statistics.at(sites).solve(recipe), **asked)
        gate = recipe.gate_site(self.model)
        return solve_turns(at_gate(self.turns, gate, sites), recipe)


def at_gate(turns: Turns, gate: Site, sites: Iterable[Site]) -> Turns:
    """What was recorded, for a gate that reads another recorded place, and for some of the sites."""
    read = turns.gate if gate == turns.gate_site else turns.repaired[gate][:, 0]
    return replace(turns, gate_site=gate, gate=read, repaired={site: turns.repaired[site] for site in sites})


class Joined(Sequence):
    """Several classes of prompts as one, each prompt read when it is asked for."""

    def __init__(self, parts: Sequence[Samples]):
        self._places = [(part, index) for part in parts for index in range(len(part))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, place = self._places[index]
        return part[place]


def by_modality(prompts: Mapping[str, Samples]) -> tuple[Joined, Joined]:
    """The benign and the malicious prompts of the family "modality"."""
    benign = Joined([prompts[name] for name in ("benign", "neutral") if name in prompts])
    return benign, Joined([prompts[name] for name in ("malicious", "refused") if name in prompts])
