"""Covariances in, safety subspaces out; saved and loaded as safetensors."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import subspace_files
from .configuration_care import SCOPES
from .gating import TURN, Gate
from .linalg import RunningCovariance, oblique_pair, orthonormalize, solve_moments
from .projection import FUSIONS, MODALITIES, Subspace
from .sites import Site, hidden_size


@dataclass(frozen=True, eq=False)
class SafetySubspaces:
    """Everything that a repair adds to a model: subspaces per site, and when and how they are applied.

    Attributes:
        sites: ``sites[site]["visual" | "text"]``, applied by `projection.SafetyProjection`, or
            ``sites[site]["last" | "response"]``, applied by `gating.TurnProjection`.
        fusion, fusion_weight, strength: see `projection.SafetyProjection`.
        metadata: what is known of the origin, as strings; saved along.
        gate, gate_site: what tells the last token of a prompt and decides there whether to repair; None if nothing
            asks.
        scope: which tokens a repair by modality applies to, "all" or those of the "prompt".

    Raises:
        ValueError: no sites, an unknown modality, fusion or scope, or bases of different hidden sizes.
    """

    sites: Mapping[Site, Mapping[str, Subspace]]
    fusion: str = "adaptive"
    fusion_weight: float = 0.5
    strength: float = 1.0
    metadata: Mapping[str, str] = field(default_factory=dict)
    gate: Gate | None = None
    gate_site: Site | None = None
    scope: str = "all"

    def __post_init__(self):
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion={self.fusion!r} is not known; choose one of {FUSIONS}.")
        if not self.sites or not all(self.sites.values()):
            raise ValueError("Subspaces need at least one site, and every site at least one modality.")
        unknown = {name for by_modality in self.sites.values() for name in by_modality} - {*MODALITIES, *TURN}
        if unknown:
            raise ValueError(f"Modalities {sorted(unknown)} are not known; choose from {MODALITIES}, or from {TURN}.")
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r} is not known; choose one of {SCOPES}.")
        if (self.gate is None) != (self.gate_site is None):
            raise ValueError("A gate and the site that it reads come together; give both or neither.")
        sizes = {s.basis.shape[0] for by_modality in self.sites.values() for s in by_modality.values()}
        if len(sizes) > 1:
            raise ValueError(f"Bases of one model share its hidden size; got {sorted(sizes)}.")

    @classmethod
    def random(
        cls, model, layers: Sequence[int], rank: int, seed: int = 0, component: str = "ffn"
    ) -> "SafetySubspaces":
        """Random orthonormal bases in both modalities, mean 0: the control that every repair must beat.

        Args:
            model: gives the hidden size.
            layers: decoder layers, from 0.
            rank: directions per subspace.
            seed: the same seed gives the same bases, independent between sites and modalities.
            component: "ffn", "attention" or "residual".

        Raises:
            ValueError: the rank does not lie between 1 and d.
        """
        dimension = hidden_size(model)
        generator = torch.Generator().manual_seed(seed)
        sites = {
            Site(layer, component): {
                name: Subspace(random_basis(dimension, rank, generator), torch.zeros(dimension)) for name in MODALITIES
            }
            for layer in layers
        }
        return cls(sites, metadata={"origin": f"random, seed {seed}"})

    @classmethod
    def from_model(cls, model) -> "SafetySubspaces":
        """Read the repair of a `CareForConditionalGeneration` out of its buffers."""
        first, config = next(iter(model.care_modules().values())), model.config
        weight = float(getattr(first, "fusion_weight", 0.5))
        site = Site.parse(config.gate["site"]) if config.gate else None
        return cls(
            model.subspaces(), config.fusion, weight, model.strength, config.origin, model.gate, site, config.scope
        )

    def only(self, modality: str) -> "SafetySubspaces":
        """The same repair without the other modality.

        Raises:
            ValueError: a site has no subspace of that modality.
        """
        lacking = [str(site) for site, by_modality in self.sites.items() if modality not in by_modality]
        if lacking:
            raise ValueError(f"Sites {lacking} have no {modality!r} subspace.")
        return replace(self, sites={site: {modality: by[modality]} for site, by in self.sites.items()})

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; tensors are named by site (``sites.16.ffn.visual.basis``), not by module.

        Raises:
            OSError: it cannot be written; what was there stays.
        """
        subspace_files.write(path, *self.content(), self.metadata)

    @property
    def digest(self) -> str:
        """A hash of all that a repair does; equal ones have equal digests, whatever their metadata."""
        tensors, settings = self.content()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def content(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a file of it holds: float32 and float64 tensors by name, and plain settings."""
        tensors = {}
        for site, by_modality in self.sites.items():
            for name, subspace in by_modality.items():
                prefix = f"sites.{site}.{name}"
                tensors[f"{prefix}.basis"] = subspace.basis.contiguous()
                tensors[f"{prefix}.mean"] = subspace.mean.contiguous()
                tensors[f"{prefix}.beta"] = torch.tensor(subspace.beta, dtype=torch.float64)
                if subspace.reader is not None:
                    tensors[f"{prefix}.reader"] = subspace.reader.contiguous()
        settings: dict[str, Any] = {name: getattr(self, name) for name in ("fusion", "fusion_weight", "strength")}
        if self.gate is not None:
            tensors["gate.readers"] = self.gate.readers.contiguous()
            tensors["gate.thresholds"] = self.gate.thresholds.contiguous()
            described = {name: getattr(self.gate, name) for name in ("required", "pictured", "prompt_end")}
            settings["gate"] = {"site": str(self.gate_site), **described}
        if self.scope != "all":
            settings["scope"] = self.scope
        return tensors, settings

    @classmethod
    def load(cls, path: str | Path) -> "SafetySubspaces":
        """Read what `save` or `care_hf.save_adapter` wrote, in this or an older format.

        Raises:
            FileNotFoundError, IsADirectoryError: there is no such file.
            ValueError: the file is not of this format, is of a later one, or is not what was written, bit for bit.
        """
        return cls(**subspace_files.read(path)[0])


def random_basis(dimension: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """An orthonormal basis (d, k), float64, of a uniformly random subspace.

    Raises:
        ValueError: the rank does not lie between 1 and d.
    """
    if not 1 <= rank <= dimension:
        raise ValueError(f"rank={rank} must lie between 1 and the hidden size d={dimension}.")
    return orthonormalize(torch.randn(dimension, rank, generator=generator, dtype=torch.float64))


def random_like(subspaces: SafetySubspaces, seed: int = 0) -> SafetySubspaces:
    """The control of equal rank: random orthogonal bases at the same sites, all else the same, the gate too."""
    generator = torch.Generator().manual_seed(seed)
    sites = {
        site: {
            name: Subspace(random_basis(*s.basis.shape, generator), s.mean, s.beta)
            for name, s in sorted(by_modality.items())
        }
        for site, by_modality in subspaces.sites.items()
    }
    return replace(subspaces, sites=sites, metadata={"origin": f"random, seed {seed}"})


@dataclass(frozen=True)
class FitReport:
    """How one subspace came about: its eigenvalues, the shrinkage, and the number of tokens of each class."""

    eigenvalues: tuple[float, ...]
    shrinkage: float
    benign: int
    malicious: int


def fit_subspace(
    benign: RunningCovariance,
    malicious: RunningCovariance,
    *,
    rank: int,
    centring: str = "benign",
    shrinkage: str | float = "ledoit-wolf",
    projector: str = "orthogonal",
    beta: float = 1.0,
) -> tuple[Subspace, FitReport]:
    """Solve for the directions in which malicious tokens deviate most from benign ones (arXiv 2603.27240, step 3).

    Args:
        benign: the moments of the benign tokens.
        malicious: those of the malicious tokens.
        rank: k.
        centring: "benign": both covariances about the benign mean, so that a shift of the mean counts; "own": each
            about its own.
        shrinkage: of the benign covariance, "ledoit-wolf" or a share in [0, 1].
        projector: "orthogonal" or "oblique", see `linalg.oblique_pair`.
        beta: see `Subspace`.

    Raises:
        ValueError: a class has fewer tokens than the rank, or the benign covariance is singular.
    """
    for name, moments in (("benign", benign), ("malicious", malicious)):
        if moments.count < rank:
            raise ValueError(
                f"rank={rank} exceeds the {moments.count} {name} tokens; give more prompts, keep more tokens, or lower "
                "the rank."
            )
    share = benign.ledoit_wolf_shrinkage() if shrinkage == "ledoit-wolf" else float(shrinkage)
    malicious.to(benign.mean.device)  # one of them may have been read from a file
    moments = malicious.moments(benign.mean if centring == "benign" else None)
    values, vectors = solve_moments(moments, benign.whitening(share), rank)
    mean = benign.mean.float()
    if projector == "oblique":
        moved = (1 - share) * benign.moments().product(vectors) + benign.ridge(share) * vectors
        basis, reader = oblique_pair(moved, vectors)
        subspace = Subspace(basis, mean, beta, reader)
    else:
        subspace = Subspace(orthonormalize(vectors), mean, beta)
    return subspace, FitReport(tuple(values.tolist()), share, benign.count, malicious.count)


def fit_subspaces(
    moments: Mapping[Site, Mapping[str, Mapping[str, RunningCovariance]]],
    *,
    fusion: str = "adaptive",
    fusion_weight: float = 0.5,
    strength: float = 1.0,
    metadata: Mapping[str, str] | None = None,
    **options,
) -> SafetySubspaces:
    """Run `fit_subspace` with `options` for every site and modality; the reports go into the metadata, as JSON under
    "reports".

    Raises:
        ValueError: as `fit_subspace`, naming the site and modality.
    """
    sites: dict[Site, dict[str, Subspace]] = {}
    reports: dict[str, dict] = {}
    for site, by_modality in moments.items():
        sites[site] = {}
        for name, by_class in by_modality.items():
            try:
                sites[site][name], report = fit_subspace(by_class["benign"], by_class["malicious"], **options)
            except ValueError as error:
                raise ValueError(f"Site {site}, {name} tokens: {error}") from error
            reports[f"{site}.{name}"] = asdict(report)
    return SafetySubspaces(sites, fusion, fusion_weight, strength, {**(metadata or {}), "reports": json.dumps(reports)})
