"""Every choice of the method, in one place, checked before any work starts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .projection import FUSIONS, MODALITIES
from .sites import COMPONENTS, Site, decoder_layers

ATTRIBUTIONS = ("kernel", "random", "all")
CENTRINGS = ("benign", "own")
PROJECTORS = ("orthogonal", "oblique")


@dataclass(frozen=True)
class Recipe:
    """How `fit` turns activations into a repair. The defaults are the printed method (arXiv 2603.27240), the recipe
    "paper".

    What the paper leaves open (rank, share of tokens, beta, batch) is set here and nowhere else.

    Attributes:
        layers: decoder layers to repair, counted from 0; "middle" is the pair at half depth (16 and 17 of LLaVA's 32).
        component: "ffn", "attention" or "residual".
        modalities: the subspaces to fit, "visual" and "text" or one of them.
        rank: directions per subspace, k.
        attribution: how tokens are chosen: "kernel" scores (the paper's), "random" (the control) or "all".
        keep_visual, keep_text: how many tokens of a prompt are kept: a count, or a share in (0, 1].
        centring: about whose mean both covariances are taken: "benign", or each class its "own" (which discards the
            mean shift).
        shrinkage: of the benign covariance, "ledoit-wolf" or a share in [0, 1] of the scaled identity.
        projector: "orthogonal" (QR of the eigenvectors) or "oblique" (I - C_b U U^T, which leaves benign correlations
            intact).
        beta: how much of the benign mean is put back; 1 is the affine projection about it.
        fusion: how two corrections become one, see `projection.repair`.
        fusion_weight: weight of the visual correction under fusion "constant".
        strength: scales the whole correction; 0 is the base model.
        batch_size: prompts per forward while activations are collected.
        seed: of random attribution.
    """

    layers: str | tuple[int, ...] = "middle"
    component: str = "ffn"
    modalities: tuple[str, ...] = MODALITIES
    rank: int = 16
    attribution: str = "kernel"
    keep_visual: int | float = 0.25
    keep_text: int | float = 0.5
    centring: str = "benign"
    shrinkage: str | float = "ledoit-wolf"
    projector: str = "orthogonal"
    beta: float = 1.0
    fusion: str = "adaptive"
    fusion_weight: float = 0.5
    strength: float = 1.0
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self):
        for name in ("layers", "modalities"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        _check_choice("component", self.component, COMPONENTS)
        _check_choice("attribution", self.attribution, ATTRIBUTIONS)
        _check_choice("centring", self.centring, CENTRINGS)
        _check_choice("projector", self.projector, PROJECTORS)
        _check_choice("fusion", self.fusion, FUSIONS)
        if not self.modalities or not isinstance(self.modalities, tuple) or set(self.modalities) - set(MODALITIES):
            raise ValueError(f"modalities={self.modalities!r} must name one or both of {MODALITIES}.")
        if isinstance(self.layers, str):
            _check_choice("layers", self.layers, ("middle",))
        elif not self.layers or not all(isinstance(layer, int) and layer >= 0 for layer in self.layers):
            raise ValueError(
                f"layers={self.layers!r} must be 'middle' or decoder layers counted from 0, for example (16, 17)."
            )
        for name in ("rank", "batch_size"):
            _check_count(name, getattr(self, name))
        for name in ("keep_visual", "keep_text"):
            _check_keep(name, getattr(self, name))
        _check_shrinkage(self.shrinkage)
        for name in ("beta", "strength", "fusion_weight"):
            if not isinstance(getattr(self, name), (int, float)):
                raise TypeError(f"{name}={getattr(self, name)!r} must be a number.")

    @classmethod
    def load(cls, recipe: "Recipe | str | Path | None") -> "Recipe":
        """Return a recipe from itself, from a name ("paper"), from a YAML file of fields, or the default from None.

        Raises:
            ValueError: no such name or file, or the file has a field that no recipe has.
        """
        if recipe is None:
            return cls()
        if isinstance(recipe, cls):
            return recipe
        if str(recipe) in RECIPES:
            return RECIPES[str(recipe)]
        if not Path(recipe).is_file():
            raise ValueError(f"Recipe {str(recipe)!r} is neither a file nor one of {tuple(RECIPES)}.")
        import yaml

        values = yaml.safe_load(Path(recipe).read_text()) or {}
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"{recipe}: no recipe has the fields {unknown}; known are {[f.name for f in fields(cls)]}."
            )
        return cls(**values)

    def sites(self, model) -> tuple[Site, ...]:
        """The places of `model` that this recipe repairs.

        Raises:
            ValueError: the model has fewer layers.
        """
        depth = len(decoder_layers(model))
        layers = (depth // 2, min(depth // 2 + 1, depth - 1)) if self.layers == "middle" else self.layers
        beyond = [layer for layer in layers if layer >= depth]
        if beyond:
            raise ValueError(
                f"layers={self.layers!r}: the model has {depth} decoder layers (0 to {depth - 1}), so no {beyond}."
            )
        return tuple(Site(layer, self.component) for layer in sorted(set(layers)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and YAML hold them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def replace(self, **changes: Any) -> "Recipe":
        """A copy with some fields changed."""
        return replace(self, **changes)


def _check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; choose one of {tuple(known)}.")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


def _check_keep(name: str, value: Any) -> None:
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not count and not (isinstance(value, float) and 0 < value <= 1):
        raise ValueError(f"{name}={value!r} must be a count of tokens (int, at least 1) or a share (float in (0, 1]).")


def _check_shrinkage(value: Any) -> None:
    share = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    if value != "ledoit-wolf" and not share:
        raise ValueError(f"shrinkage={value!r} must be 'ledoit-wolf' or a number in [0, 1].")


RECIPES: dict[str, Recipe] = {"paper": Recipe()}
