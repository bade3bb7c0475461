"""What a tuning searches: recipes of two families, and the places of a model that they may repair."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .recipe import Recipe
from .search_values import DIMENSIONS, FAMILIES, MODALITY, MODALITY_FAMILY, TURN, TURN_FAMILY, Choice, Range
from .sites import COMPONENTS, Site, decoder_layers, runs_before

MOST_LAYERS = 8  # that are searched unless told: what is collected grows with them
COLLECTED = ("steps", "attribution", "keep_visual", "keep_text")  # what is collected depends on them: not searched


@dataclass(frozen=True)
class Space:
    """Where recipes are searched.

    Attributes:
        layers: decoder layers from 0 that may be repaired, ascending; several that are repaired at once are neighbours
            in this list.
        gate_layers: layers that a gate may read; after each some layer of `layers` is left to repair.
        families: of `FAMILIES`: "turn" repairs where a request ends, behind a gate; "modality" tokens by their kind.
        dimensions: by family and field, what is chosen from.
        fixed: the recipe that gives all that is not searched: steps, modalities, attribution, batch size, seed.
    """

    layers: tuple[int, ...]
    gate_layers: tuple[int, ...]
    families: tuple[str, ...] = FAMILIES
    dimensions: Mapping[str, Mapping[str, Choice | Range]] = field(default_factory=lambda: DIMENSIONS)
    fixed: Recipe = field(default_factory=Recipe)

    def __post_init__(self):
        unknown = sorted(set(self.families) - set(FAMILIES))
        if unknown or not self.families:
            raise ValueError(f"families={self.families!r} must name one or both of {FAMILIES}.")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers={self.layers!r} must be decoder layers counted from 0, ascending, each once.")
        if TURN_FAMILY in self.families:
            late = [gate for gate in self.gate_layers if gate < 0 or gate > self.layers[-1]]
            if late or not self.gate_layers:
                raise ValueError(
                    f"gate_layers={self.gate_layers!r} must name layers, none of them after the last of "
                    f"layers={self.layers!r}, which would leave nothing to repair after the gate."
                )
        for family in self.families:
            known, given = set(DIMENSIONS[family]), set(self.dimensions.get(family, {}))
            if known != given:
                raise ValueError(f"dimensions of {family!r} must be {sorted(known)}, not {sorted(given)}.")
            components = self.dimensions[family]["component"].values
            if set(components) - set(COMPONENTS):
                raise ValueError(f"component={components!r} must be of {COMPONENTS}.")

    @classmethod
    def of(
        cls,
        model,
        *,
        layers: tuple[int, ...] | None = None,
        gate_layers: tuple[int, ...] | None = None,
        families: tuple[str, ...] = FAMILIES,
        batch_size: int = 8,
        **ranges: Choice | Range,
    ) -> "Space":
        """The space of a model.

        Args:
            model: whose decoder is repaired.
            layers: to search; by default the upper two thirds, of which at most `MOST_LAYERS` are taken, those of the
                recipes "gated" and "paper" among them.
            gate_layers: by default up to four of them in the middle third.
            families: see `Space`.
            batch_size: prompts per forward while activations are collected.
            ranges: by field, in place of the default, in every family that has it.

        Raises:
            ValueError: no family has such a field, or the model has no such layer.
        """
        depth = len(decoder_layers(model))
        middle, deep = depth // 2, depth * 2 // 3
        if layers is None:
            layers = _spread(range(max(1, depth // 3), depth), MOST_LAYERS, {middle, min(middle + 1, depth - 1), deep})
        if gate_layers is None:
            gate_layers = _spread(range(max(0, depth // 4), max(deep, middle + 1)), 4, {middle})
            gate_layers = tuple(layer for layer in gate_layers if layer <= max(layers))
        beyond = [layer for layer in (*layers, *gate_layers) if layer >= depth]
        if beyond:
            raise ValueError(f"The model has {depth} decoder layers (0 to {depth - 1}), so no {beyond}.")
        unknown = sorted(name for name in ranges if not any(name in fields for fields in DIMENSIONS.values()))
        if unknown:
            raise ValueError(f"Nothing called {unknown} is searched; known are {sorted({*TURN, *MODALITY})}.")
        dimensions = {
            family: {name: ranges.get(name, default) for name, default in fields.items()}
            for family, fields in DIMENSIONS.items()
        }
        return cls(tuple(layers), tuple(gate_layers), tuple(families), dimensions, Recipe(batch_size=batch_size))

    def suggest(self, trial) -> Recipe:
        """Let an optuna trial choose a recipe; what a choice makes meaningless is not asked.

        A parameter's name begins with the family, so that what is learnt of one says nothing of the other.
        """
        family = trial.suggest_categorical("family", list(self.families))
        fields = self.dimensions[family]

        def ask(name: str) -> Any:
            return fields[name].suggest(trial, f"{family}.{name}")

        if family == TURN_FAMILY:
            return self._by_turn(ask, trial.suggest_categorical(f"{family}.gate_layer", list(self.gate_layers)))
        return self._by_modality(ask)

    def _by_turn(self, ask, gate: int) -> Recipe:
        chosen = {"gate_layer": gate, "scope": tuple(ask("scope").split("+"))}
        chosen["sites"] = self._sites(ask, gate)
        chosen |= {name: ask(name) for name in ("rank", "basis", "anchor", "strength", "gate_ridge", "false_alarms")}
        if chosen["anchor"] != "none":  # of which there is nothing to put back
            chosen["beta"] = ask("beta")
        if chosen["basis"] == "filter":
            chosen |= {name: ask(name) for name in ("projector", "centring", "shrinkage")}
        return self.fixed.replace(**chosen)

    def _by_modality(self, ask) -> Recipe:
        # The end of a prompt is found before anything is repaired: by layer 0, if that is not among them.
        chosen = {"scope": ask("scope"), "gate_layer": 0, "sites": self._sites(ask, None)}
        names = ("rank", "beta", "strength", "projector", "centring", "shrinkage", "fusion")
        chosen |= {name: ask(name) for name in names}
        if chosen["fusion"] == "constant":
            chosen["fusion_weight"] = ask("fusion_weight")
        return self.fixed.replace(basis="filter", anchor="benign", gate="none", **chosen)

    def _sites(self, ask, gate: int | None) -> tuple[str, ...]:
        component = ask("component")
        usable = self._usable(component, gate)
        start = min(int(ask("first") * len(usable)), len(usable) - 1)
        return tuple(f"{layer}.{component}" for layer in usable[start : start + ask("count")])

    def _usable(self, component: str, gate: int | None) -> list[int]:
        """The layers whose component runs after the gate; of a gate at the last one, its residual stream does."""
        if gate is None:
            return list(self.layers)
        read = Site(gate, "residual")
        return [layer for layer in self.layers if runs_before(read, Site(layer, component))] or [self.layers[-1]]

    def parameters(self, recipe: Recipe, model) -> dict[str, Any]:
        """What `suggest` has to choose to come out at `recipe`, by parameter, for a search to start there.

        Raises:
            ValueError: the recipe lies outside this space.
        """
        family = TURN_FAMILY if recipe.by_turn else MODALITY_FAMILY
        sites = recipe.find_sites(model)
        gate = recipe.gate_site(model).layer if recipe.by_turn else None
        values = {**recipe.to_dict(), "scope": "+".join(recipe.scope) if recipe.by_turn else recipe.scope}
        values |= {"component": sites[0].component, "count": len(sites)}
        usable = self._usable(sites[0].component, gate)
        if sites[0].layer in usable:  # the middle of its share
            values["first"] = (usable.index(sites[0].layer) + 0.5) / len(usable)
        fields = self.dimensions[family]
        outside = [name for name in fields if name not in values or not fields[name].holds(values[name])]
        outside += [name for name in COLLECTED if getattr(recipe, name) != getattr(self.fixed, name)]
        found = {"family": family, **{f"{family}.{name}": values.get(name) for name in fields}}
        if recipe.by_turn:
            found[f"{family}.gate_layer"] = gate
        if family not in self.families or outside or self._given(found).find_sites(model) != sites:
            raise ValueError(
                f"The recipe lies outside the space (family {family!r}, sites {[str(site) for site in sites]}, "
                f"{ {name: values.get(name) for name in outside} }); widen the space, or do not start there."
            )
        return found

    def _given(self, parameters: Mapping[str, Any]) -> Recipe:
        return self.suggest(_Given(parameters))

    def sites(self, family: str) -> tuple[Site, ...]:
        """All places that recipes of a family repair, or whose residual stream their gates read."""
        components = self.dimensions[family]["component"].values
        found = {Site(layer, component) for layer in self.layers for component in components}
        if family == TURN_FAMILY:
            first = Site(min(self.gate_layers), "residual")
            found |= {Site(layer, "residual") for layer in self.gate_layers}
            found = {site for site in found if runs_before(first, site)}
        return tuple(sorted(found))

    def of_text(self) -> "Space":
        """The same for prompts without images."""
        return replace(self, fixed=self.fixed.replace(modalities=("text",)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        dimensions = {
            family: {name: asdict(values) for name, values in self.dimensions[family].items()}
            for family in self.families
        }
        told = {"layers": list(self.layers), "gate_layers": list(self.gate_layers), "families": list(self.families)}
        return {**told, "dimensions": dimensions, "fixed": self.fixed.to_dict()}


class _Given:
    """Chooses as it is told, in the place of an optuna trial."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """What was given."""
        return self.values[name]

    def suggest_int(self, name: str, low: Any, high: Any, log: bool = False) -> Any:
        """What was given."""
        return self.values[name]

    suggest_float = suggest_int


def _spread(candidates: range, most: int, wanted: set[int]) -> tuple[int, ...]:
    """At most `most` layers, evenly from all, those that are wanted in any case."""
    layers = list(candidates)
    if len(layers) <= most:
        return tuple(layers)
    kept = wanted & set(layers)
    even = [layers[i * (len(layers) - 1) // (most - 1)] for i in range(most)]
    # A wanted layer takes the place of the even one that is nearest to it.
    for layer in sorted(kept - set(even)):
        nearest = min((other for other in even if other not in kept), key=lambda other: abs(other - layer))
        even[even.index(nearest)] = layer
    return tuple(sorted(set(even)))
