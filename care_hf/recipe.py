"""Every choice of the method, in one place, checked before any work starts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .gating import TURN
from .projection import FUSIONS, MODALITIES
from .settings_files import check_choice, check_types, find_file, made, meant, read_fields
from .sites import COMPONENTS, Site, decoder_layers, runs_before

ATTRIBUTIONS = ("kernel", "random", "all")
CENTRINGS = ("benign", "own")
PROJECTORS = ("orthogonal", "oblique")
ANCHORS = ("benign", "refused", "none")
BASES = ("filter", "pattern")
GATES = ("linear", "none")
DEPTHS = {"middle": (1, 2), "two-thirds": (2, 3)}
AUTO = "auto"


@dataclass(frozen=True)
class Recipe:
    """How `fit` turns activations into a repair.

    The defaults are the recipe "gated": a gate that decides at the last token of the prompt, and a correction towards
    what the model does when it refuses. The recipe "paper" is the printed method (arXiv 2603.27240); what the paper
    leaves open (rank, share of tokens, beta, batch) is set here and nowhere else.

    Attributes:
        scope: which tokens are repaired: one or both of "last" (of the prompt) and "response", or "prompt" or "all".
        layers: decoder layers to repair, counted from 0; "middle" is the pair at half depth (16 and 17 of LLaVA's 32),
            "two-thirds" the one there (21).
        component: "ffn", "attention" or "residual".
        sites: in place of both, places by name ("16.ffn", "21.residual"), or "auto", which lets a diagnosis choose
            (`site_choice.choose_site`).
        rank: directions per subspace, k.
        basis: "filter", the generalized eigenvectors of the malicious against the benign covariance, or "pattern", the
            directions in which complying activations differ most from the anchor.
        anchor: what activations are pulled towards: the mean of "benign" prompts, of those that the model "refused", or
            "none".
        beta: how much of the anchor is put back; 1 is the affine projection about it.
        projector: "orthogonal" (QR of the directions) or "oblique" (I - C_b U U^T, which leaves benign correlations
            intact; of a filter only).
        strength: scales the whole correction; 0 is the base model.
        gate: "linear" repairs only where detectors find a harmful request, "none" always.
        gate_layer: the layer whose residual stream the gate reads, or "middle" or "two-thirds".
        gate_ridge: share of the scaled identity in the detectors' covariance.
        false_alarms: the share of any kind of harmless prompts that may set off the gate, as held-out prompts tell.
        steps: how many tokens of the response are repaired, at most.
        modalities: by which subspaces the scopes "prompt" and "all" are repaired, "visual" and "text" or one of them.
        attribution: how tokens are chosen there: "kernel" scores (the paper's), "random" (the control) or "all".
        keep_visual, keep_text: how many tokens of a prompt are kept: a count, or a share in (0, 1].
        centring: about whose mean both covariances are taken: "benign", or each class its "own" (which discards the
            mean shift).
        shrinkage: of the benign covariance, "ledoit-wolf" or a share in [0, 1] of the scaled identity.
        fusion: how two modalities' corrections become one, see `projection.SafetyProjection`.
        fusion_weight: weight of the visual correction under fusion "constant".
        batch_size: prompts per forward while activations are collected, halved where memory does not suffice; "auto"
            begins with 128 on an accelerator and 16 on a CPU. It changes results by rounding only.
        seed: of whatever is drawn at random.
    """

    scope: str | tuple[str, ...] = TURN
    layers: str | tuple[int, ...] = "two-thirds"
    component: str = "residual"
    sites: str | tuple[str, ...] | None = None
    rank: int = 4
    basis: str = "pattern"
    anchor: str = "refused"
    beta: float = 1.0
    projector: str = "orthogonal"
    strength: float = 1.0
    gate: str = "linear"
    gate_layer: str | int = "middle"
    gate_ridge: float = 0.005
    false_alarms: float = 0.002
    steps: int = 8
    modalities: tuple[str, ...] = MODALITIES
    attribution: str = "kernel"
    keep_visual: int | float = 0.25
    keep_text: int | float = 0.5
    centring: str = "benign"
    shrinkage: str | float = "ledoit-wolf"
    fusion: str = "adaptive"
    fusion_weight: float = 0.5
    batch_size: int | str = 8
    seed: int = 0

    def __post_init__(self):
        for name in ("layers", "modalities", "scope", "sites"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        check_types(self, besides=("sites",))
        check_choice("component", self.component, COMPONENTS)
        check_choice("attribution", self.attribution, ATTRIBUTIONS)
        check_choice("centring", self.centring, CENTRINGS)
        check_choice("projector", self.projector, PROJECTORS)
        check_choice("fusion", self.fusion, FUSIONS)
        check_choice("anchor", self.anchor, ANCHORS)
        check_choice("basis", self.basis, BASES)
        check_choice("gate", self.gate, GATES)
        self._check_scope()
        if not self.modalities or set(self.modalities) - set(MODALITIES):
            hints = _meant(self.modalities, MODALITIES)
            raise ValueError(f"modalities={self.modalities!r} must name one or both of {MODALITIES}.{hints}")
        if isinstance(self.layers, str):
            check_choice("layers", self.layers, tuple(DEPTHS))
        elif not self.layers or min(self.layers) < 0:
            raise ValueError(
                f"layers={self.layers!r} must be 'middle' or decoder layers counted from 0, for example (16, 17)."
            )
        self._check_sites()
        if isinstance(self.gate_layer, str):
            check_choice("gate_layer", self.gate_layer, tuple(DEPTHS))
        for name in ("rank", "steps"):
            _check_count(name, getattr(self, name))
        if self.batch_size != AUTO:
            _check_count("batch_size", self.batch_size, f", or {AUTO!r}")
        for name in ("keep_visual", "keep_text"):
            _check_keep(name, getattr(self, name))
        _check_shrinkage(self.shrinkage)
        for name in ("gate_ridge", "false_alarms"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must lie between 0 and 1.")

    def _check_sites(self) -> None:
        if self.sites is None or self.sites == AUTO:
            return
        named = isinstance(self.sites, tuple) and all(isinstance(name, str) for name in self.sites)
        if not named or not self.sites:
            raise ValueError(f"sites={self.sites!r} must be {AUTO!r}, or places by name, for example ('16.ffn',).")
        for name in self.sites:
            Site.parse(name)

    def _check_scope(self) -> None:
        if self.by_turn:
            if not self.scope or set(self.scope) - set(TURN):
                hints = _meant(self.scope, TURN)
                raise ValueError(f"scope={self.scope!r} must be 'all', 'prompt', or one or both of {TURN}.{hints}")
            if self.basis == "pattern" and self.projector == "oblique":
                raise ValueError("projector='oblique' belongs to basis='filter'; patterns are projected orthogonally.")
            return
        check_choice("scope", self.scope, ("all", "prompt"))
        for name, value in (("basis", "filter"), ("gate", "none")):
            if getattr(self, name) != value:
                raise ValueError(
                    f"scope={self.scope!r} needs {name}={value!r}, not {getattr(self, name)!r}: before the last token "
                    f"of the prompt nothing is decided; use a scope of {TURN} for the other."
                )
        if self.anchor == "refused":
            raise ValueError(f"scope={self.scope!r} knows no refused activations; use anchor='benign' or 'none'.")

    @property
    def by_turn(self) -> bool:
        """Whether the last token of the prompt and the response are repaired, rather than tokens by their modality."""
        return not isinstance(self.scope, str)

    @classmethod
    def load(cls, recipe: "Recipe | str | Path | None") -> "Recipe":
        """Return a recipe from itself, from a name, from a YAML file of fields, or the default from None.

        Names are "gated", "paper", and those of the files in ``configs``: "llava-1.5-7b".

        Raises:
            ValueError: no such name or file, the file is not YAML, or it has a field that no recipe has or a value that
                does not fit; the message says where, and what was probably meant.
        """
        if recipe is None:
            return cls()
        if isinstance(recipe, cls):
            return recipe
        if str(recipe) in RECIPES:
            return RECIPES[str(recipe)]
        path = find_file(recipe, "Recipe", names=tuple(RECIPES))
        return made(cls, read_fields(path), str(path))

    def find_sites(self, model) -> tuple[Site, ...]:
        """The places of `model` that this recipe repairs.

        Raises:
            ValueError: the model has fewer layers, or `sites` is "auto" and waits for a diagnosis.
        """
        depth = len(decoder_layers(model))
        if self.sites == AUTO:
            raise ValueError("sites='auto' takes its sites from a diagnosis; pass `fit(..., diagnosis=...)`.")
        if self.sites is not None:
            named = tuple(sorted({Site.parse(name) for name in self.sites}))
            beyond = [str(site) for site in named if site.layer >= depth]
            if beyond:
                raise ValueError(f"sites={self.sites}: the model has {depth} decoder layers, so no {beyond}.")
            return named
        layers = self.layers
        if layers == "middle":
            layers = (depth // 2, min(depth // 2 + 1, depth - 1))
        elif layers == "two-thirds":
            layers = (depth * 2 // 3,)
        beyond = [layer for layer in layers if layer >= depth]
        if beyond:
            raise ValueError(
                f"layers={self.layers!r}: the model has {depth} decoder layers (0 to {depth - 1}), so no {beyond}."
            )
        return tuple(Site(layer, self.component) for layer in sorted(set(layers)))

    def gate_site(self, model) -> Site:
        """The place of `model` that the gate reads.

        Raises:
            ValueError: the model has fewer layers, or a site is repaired before the gate decides.
        """
        depth, layer = len(decoder_layers(model)), self.gate_layer
        if isinstance(layer, str):
            over, under = DEPTHS[layer]
            layer = depth * over // under
        if not 0 <= layer < depth:
            raise ValueError(f"gate_layer={layer}: the model has {depth} decoder layers (0 to {depth - 1}).")
        site = Site(layer, "residual")
        chosen_later = self.sites == AUTO
        early = [] if chosen_later else [str(s) for s in self.find_sites(model) if not runs_before(site, s)]
        if early and (self.by_turn or self.scope == "prompt"):
            raise ValueError(
                f"gate_layer={layer}: sites {early} run before the gate decides; choose later layers or an earlier "
                "gate_layer."
            )
        return site

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and YAML hold them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def replace(self, **changes: Any) -> "Recipe":
        """A copy with some fields changed."""
        return replace(self, **changes)


def _meant(given: Sequence[str], known: Sequence[str]) -> str:
    return "".join(meant(name, known) for name in given if name not in known)


def _check_count(name: str, value: Any, otherwise: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1{otherwise}.")


def _check_keep(name: str, value: Any) -> None:
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not count and not (isinstance(value, float) and 0 < value <= 1):
        raise ValueError(f"{name}={value!r} must be a count of tokens (int, at least 1) or a share (float in (0, 1]).")


def _check_shrinkage(value: Any) -> None:
    share = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    if value != "ledoit-wolf" and not share:
        raise ValueError(f"shrinkage={value!r} must be 'ledoit-wolf' or a number in [0, 1].")


RECIPES: dict[str, Recipe] = {
    "gated": Recipe(),
    "paper": Recipe(
        scope="all", layers="middle", component="ffn", rank=16, basis="filter", anchor="benign", gate="none"
    ),
}
