"""The repair as pure tensors: torch only, shared by the wrapper and everything that applies a repair elsewhere.

All of it happens in coefficient space. For one modality with orthonormal basis B (d, k), reader R (d, k), benign mean m
and beta,

    c = R^T (beta m - h),    h' = h + B c,

which is ``h' = P_safe h + beta (I - P_safe) h_benign`` of arXiv 2603.27240 with ``P_safe = I - B R^T``. No d x d matrix
is formed, and since B is orthonormal the norm of a correction is the norm of its k coefficients.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

MODALITIES = ("visual", "text")
FUSIONS = ("adaptive", "printed", "union", "route", "constant")
MIXED = ("printed", "union")  # need a matrix of both bases, see `mixing_matrix`
TOLERANCE = 1e-4  # of orthonormality; float32 QR at d = 8192 stays below 1e-5


@dataclass(frozen=True, eq=False)
class Subspace:
    """The unsafe subspace of one modality at one site.

    Attributes:
        basis: (d, k), orthonormal columns; the correction lies in its span.
        mean: (d,), the anchor that the correction pulls towards, the benign mean in the printed method; or (T, d), one
            anchor per token since the prompt ended (`gating.TurnProjection`).
        beta: how much of the mean is put back: 1 is the affine projection about the mean, 0 the linear projection.
        reader: (d, k) with ``reader^T basis = I`` for an oblique projector ``I - basis reader^T``; None for the
            orthogonal one.

    Raises:
        ValueError: shapes do not fit, a value is not finite, the basis is not orthonormal, or the reader does not
            belong to it.
    """

    basis: torch.Tensor
    mean: torch.Tensor
    beta: float = 1.0
    reader: torch.Tensor | None = None

    def __post_init__(self):
        for name in ("basis", "mean", "reader"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, value.detach().to(torch.float32))
        object.__setattr__(self, "beta", float(self.beta))
        self._check()

    def _check(self) -> None:
        basis, reader = self.basis, self.basis if self.reader is None else self.reader
        if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
            raise ValueError(f"A basis of shape {tuple(basis.shape)} must be (d, k) with 1 <= k <= d.")
        if self.mean.ndim not in (1, 2) or self.mean.shape[-1:] != basis.shape[:1] or reader.shape != basis.shape:
            raise ValueError(
                f"mean {tuple(self.mean.shape)} and reader {tuple(reader.shape)} do not fit a basis of shape "
                f"{tuple(basis.shape)}; expected {tuple(basis.shape[:1])} and {tuple(basis.shape)}."
            )
        if not all(torch.isfinite(t).all() for t in (basis, self.mean, reader, torch.tensor(self.beta))):
            raise ValueError(
                "A basis, mean, reader or beta is not finite; the fit or the file it comes from is broken."
            )
        for name, product in (("basis^T basis", basis.mT @ basis), ("reader^T basis", reader.mT @ basis)):
            error = (product - torch.eye(len(product), device=product.device)).abs().max().item()
            # An oblique reader may be long, so its rounding error is larger by its norm.
            scale = max(1.0, torch.linalg.vector_norm(reader, dim=0).max().item()) if name.startswith("reader") else 1.0
            if error > TOLERANCE * scale:
                raise ValueError(
                    f"{name} differs from the identity by {error:.2g} (at most {TOLERANCE * scale:.2g} is rounding); "
                    "orthonormalise the basis (`linalg.orthonormalize`), or build the pair with `linalg.oblique_pair`."
                )

    @property
    def rank(self) -> int:
        """k."""
        return self.basis.shape[1]

    @property
    def steps(self) -> int:
        """T, or 0 where there is one anchor for all tokens."""
        return len(self.mean) if self.mean.ndim == 2 else 0


class FixedPrecision(nn.Module):
    """Moves with the model, but never changes dtype: half-precision bases would not be orthonormal."""

    def _apply(self, fn, recurse=True):
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            after = getattr(module, leaf)
            if after.dtype != before.dtype:
                setattr(module, leaf, before.to(after.device))
        return self


def full_precision(buffer: torch.Tensor) -> torch.Tensor:
    """The buffer, if it still has the precision that it was fitted in.

    Raises:
        ValueError: something cast it past `FixedPrecision`.
    """
    if buffer.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"The buffers of the repair were cast to {buffer.dtype}, in which it is not exact; keep them as they are, "
            "with FullyShardedDataParallel by MixedPrecision(buffer_dtype=torch.float32)."
        )
    return buffer


class ModalityProjection(nn.Module):
    """Buffers of one `Subspace`, float32: `basis`, `mean`, `beta` (0-dim) and, for an oblique projector, `reader`."""

    def __init__(self, dimension: int, rank: int, oblique: bool, steps: int = 0):
        super().__init__()
        if not 1 <= rank <= dimension:
            raise ValueError(f"rank={rank} must lie between 1 and the hidden size d={dimension}.")
        # NaN until loaded: what a file fails to bring can then be told from what it brings.
        self.register_buffer("basis", torch.full((dimension, rank), torch.nan, dtype=torch.float32))
        anchors = (steps, dimension) if steps else (dimension,)
        self.register_buffer("mean", torch.full(anchors, torch.nan, dtype=torch.float32))
        self.register_buffer("beta", torch.tensor(torch.nan, dtype=torch.float32))
        self.register_buffer(
            "reader", torch.full((dimension, rank), torch.nan, dtype=torch.float32) if oblique else None
        )

    def read_by(self, dtype: torch.dtype) -> torch.Tensor:
        """R (d, k), what coefficients are read with: the basis itself unless the projector is oblique."""
        return full_precision(self.basis if self.reader is None else self.reader).to(dtype)

    def target(self, dtype: torch.dtype) -> torch.Tensor:
        """R^T beta m, (k,) or (T, k), the coefficients that repaired activations have."""
        return (self.beta * self.mean).to(dtype) @ self.read_by(dtype)

    def load(self, subspace: Subspace) -> None:
        """Fill the buffers."""
        self.basis.copy_(subspace.basis)
        self.mean.copy_(subspace.mean)
        self.beta.fill_(subspace.beta)
        if subspace.reader is not None:
            self.reader.copy_(subspace.reader)

    def trainable(self) -> list[torch.Tensor]:
        """The buffers that may be trained: basis, mean, reader."""
        return [t for t in (self.basis, self.mean, self.reader) if t is not None]

    @torch.no_grad()
    def retract(self) -> None:
        """Make the basis orthonormal again after a step of training, and have ``reader^T basis = I``."""
        basis, triangle = torch.linalg.qr(self.basis.double())
        self.basis.copy_(basis * triangle.diagonal().sign())
        if self.reader is not None:
            reader = self.reader.double()
            self.reader.copy_(torch.linalg.solve(reader.mT @ self.basis.double(), reader.mT).mT)

    def subspace(self) -> Subspace:
        """The buffers as a checked `Subspace`."""
        return Subspace(self.basis, self.mean, float(self.beta), self.reader)


class SafetyProjection(FixedPrecision):
    """The repair of one site: one or two modalities and how their corrections become one.

    With one modality there is nothing to fuse: its correction is applied to every token, or under "route" to its own
    tokens only. With two, ``h' = w h'_visual + (1 - w) h'_text`` where

    - "adaptive": ``w = |h'_visual - h| / (|h'_visual - h| + |h'_text - h|)``, 0.5 where neither corrects;
    - "printed": the numerator is ``|h'_visual - h'_text|``, the bounded literal reading of arXiv 2603.27240: it throws
      away the correction of a token that only the text subspace corrects;
    - "constant": ``w = fusion_weight``;

    and otherwise

    - "route": visual tokens take the visual correction, all others the text correction;
    - "union": the smallest change within both spans that meets both targets, ``h' = h + B x`` with ``R^T B x = c`` in
      the least-squares sense, B and R the stacked bases and readers.

    Args:
        dimension: d.
        ranks: rank per modality; one or both of "visual", "text".
        fusion: one of `FUSIONS`.
        oblique: the modalities whose projector is oblique.

    Buffers are float32 whatever the model's dtype, persistent, and NaN until loaded.

    Raises:
        ValueError: no such modality or fusion.
    """

    def __init__(self, dimension: int, ranks: Mapping[str, int], fusion: str = "adaptive", oblique=()):
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"fusion={fusion!r} is not known; choose one of {FUSIONS}.")
        if not ranks or set(ranks) - set(MODALITIES):
            raise ValueError(f"Subspaces are given for {sorted(ranks)}; expected one or both of {MODALITIES}.")
        self.fusion_mode = fusion
        for name in MODALITIES:
            module = ModalityProjection(dimension, ranks[name], name in oblique) if name in ranks else None
            self.add_module(name, module)
        self.register_buffer("fusion", torch.tensor(-1))
        self.register_buffer("fusion_weight", torch.tensor(torch.nan, dtype=torch.float32))
        self.register_buffer("strength", torch.tensor(torch.nan, dtype=torch.float32))
        total = sum(ranks.values())
        mixed = fusion in MIXED and len(ranks) == 2
        self.register_buffer("mixing", torch.full((total, total), torch.nan, dtype=torch.float32) if mixed else None)

    @classmethod
    def from_subspaces(
        cls,
        subspaces: Mapping[str, Subspace],
        fusion: str = "adaptive",
        fusion_weight: float = 0.5,
        strength: float = 1.0,
    ) -> "SafetyProjection":
        """Build the repair of a site from its subspaces, on their device.

        Raises:
            ValueError: the two subspaces differ in d.
        """
        dimensions = {subspace.basis.shape[0] for subspace in subspaces.values()}
        if len(dimensions) > 1:
            raise ValueError(f"The subspaces of a site must share one hidden size; got {sorted(dimensions)}.")
        oblique = [name for name, subspace in subspaces.items() if subspace.reader is not None]
        device = next(iter(subspaces.values())).basis.device if subspaces else None
        ranks = {name: subspace.rank for name, subspace in subspaces.items()}
        module = cls(dimensions.pop() if dimensions else 0, ranks, fusion, oblique).to(device)
        for name, subspace in subspaces.items():
            getattr(module, name).load(subspace)
        module.fusion.fill_(FUSIONS.index(fusion))
        module.fusion_weight.fill_(fusion_weight)
        module.strength.fill_(strength)
        if module.mixing is not None:
            module.mixing.copy_(mixing_matrix(fusion, subspaces["visual"], subspaces["text"]))
        return module

    def forward(self, h: torch.Tensor, visual_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Repair activations.

        Args:
            h: (..., d), any floating dtype; computed in float32 at least.
            visual_mask: bool (...), True at visual tokens; only "route" reads it.

        Returns:
            (..., d) in h's dtype; exactly h where the strength is 0.

        Raises:
            ValueError: fusion is "route" and there is no mask, or one of another shape.
        """
        mask = self._check_mask(h, visual_mask).reshape(-1, 1) if self.fusion_mode == "route" else None
        if branches_freely(h) and self.strength == 0:
            return h
        work = h.to(torch.promote_types(h.dtype, torch.float32)).reshape(-1, h.shape[-1])
        parts = [part for part in (self.visual, self.text) if part is not None]
        bases = _side_by_side([part.basis for part in parts]).to(work.dtype)
        oblique = any(part.reader is not None for part in parts)
        readers = _side_by_side([part.read_by(work.dtype) for part in parts]) if oblique else bases
        targets = _side_by_side([part.target(work.dtype) for part in parts])
        coefficients = self.strength.to(work.dtype) * self._fuse(targets - work @ readers, mask)
        # In place where `work` is a copy: tensors of this size cost more to allocate than to fill.
        add = torch.addmm if work.dtype == h.dtype else torch.Tensor.addmm_
        repaired = add(work, coefficients, bases.mT).reshape(h.shape).to(h.dtype)
        # Not merely adding zero: that would turn -0.0 into 0.0 and an infinite activation into NaN.
        return repaired if branches_freely(h) else torch.where(self.strength == 0, h, repaired)

    def _fuse(self, c: torch.Tensor, visual_mask: torch.Tensor | None) -> torch.Tensor:
        """Coefficients (n, k) of the fused correction from those of the modalities side by side."""
        if self.visual is None or self.text is None:
            if visual_mask is None:
                return c
            return c * (visual_mask if self.text is None else ~visual_mask)
        if self.fusion_mode == "union":
            return c @ self.mixing.to(c.dtype).mT
        c_visual, c_text = c.split([self.visual.basis.shape[1], self.text.basis.shape[1]], dim=-1)
        weight = visual_mask.to(c.dtype) if self.fusion_mode == "route" else self._weight(c_visual, c_text)
        return torch.cat([weight * c_visual, (1 - weight) * c_text], dim=-1)

    def _weight(self, c_visual: torch.Tensor, c_text: torch.Tensor) -> torch.Tensor:
        if self.fusion_mode == "constant":
            return self.fusion_weight.to(c_visual.dtype)
        by_visual, by_text = (torch.linalg.vector_norm(c, dim=-1, keepdim=True) for c in (c_visual, c_text))
        numerator, total = by_visual, by_visual + by_text
        if self.fusion_mode == "printed":
            apart = torch.cat([c_visual, -c_text], dim=-1) @ self.mixing.to(c_visual.dtype)
            numerator = torch.linalg.vector_norm(apart, dim=-1, keepdim=True)
        # The inner `where` keeps the gradient of the unused branch finite.
        return torch.where(total > 0, numerator / torch.where(total > 0, total, 1), 0.5)

    @staticmethod
    def _check_mask(h: torch.Tensor, visual_mask: torch.Tensor | None) -> torch.Tensor:
        if visual_mask is None:
            raise ValueError(
                'Fusion "route" repairs visual and text tokens differently and was not told which are which; call the '
                "repaired model, not one of its parts."
            )
        if visual_mask.shape != h.shape[:-1]:
            raise ValueError(f"visual_mask has the shape {tuple(visual_mask.shape)}; expected {tuple(h.shape[:-1])}.")
        return visual_mask

    def subspaces(self) -> dict[str, Subspace]:
        """The buffers as checked subspaces, by modality."""
        return {name: getattr(self, name).subspace() for name in MODALITIES if getattr(self, name) is not None}

    def check(self) -> None:
        """Assert that every buffer holds what it should.

        Raises:
            ValueError: a buffer is not finite, a basis is not orthonormal, the stored fusion is not the configured one,
                or `mixing` does not belong to the bases.
        """
        subspaces = self.subspaces()
        if int(self.fusion) != FUSIONS.index(self.fusion_mode):
            raise ValueError(
                f"The buffer `fusion` is {int(self.fusion)}, but the configuration says {self.fusion_mode!r}."
            )
        for name in ("fusion_weight", "strength"):
            if not torch.isfinite(getattr(self, name)):
                raise ValueError(f"The buffer `{name}` is not finite.")
        if self.mixing is not None:
            expected = mixing_matrix(self.fusion_mode, subspaces["visual"], subspaces["text"])
            error = (self.mixing - expected.to(self.mixing)).abs().max().item()
            if not error <= TOLERANCE * max(1.0, expected.abs().max().item()):
                raise ValueError(f"The buffer `mixing` differs from what the bases give by {error:.2g}.")


def branches_freely(h: torch.Tensor) -> bool:
    """Whether values may decide which code runs on h: neither waits for a GPU, nor breaks a compiled graph."""
    return h.device.type == "cpu" and not torch.compiler.is_compiling()


def _side_by_side(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=-1)


def mixing_matrix(fusion: str, visual: Subspace, text: Subspace) -> torch.Tensor:
    """What the fusions in `MIXED` need of both bases, float32 (k_v + k_t, k_v + k_t), computed in float64.

    "union": the pseudo-inverse of ``R^T B``, B and R the stacked bases and readers; singular values below 1e-6 of the
    largest count as shared directions. "printed": ``M = (B^T B)^(1/2)``, so that ``|B x| = |M x|`` without any d.
    """
    bases = torch.cat([visual.basis, text.basis], dim=1).double()
    if fusion == "printed":
        values, vectors = torch.linalg.eigh(bases.mT @ bases)
        return (vectors * values.clamp(min=0).sqrt() @ vectors.mT).float()
    readers = torch.cat([s.basis if s.reader is None else s.reader for s in (visual, text)], dim=1).double()
    return torch.linalg.pinv(readers.mT @ bases, rtol=1e-6).float()


def repair(
    h: torch.Tensor,
    subspaces: Mapping[str, Subspace],
    fusion: str = "adaptive",
    fusion_weight: float = 0.5,
    strength: float = 1.0,
    visual_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Repair activations h (..., d) once, without keeping a module; see `SafetyProjection`."""
    return SafetyProjection.from_subspaces(subspaces, fusion, fusion_weight, strength)(h, visual_mask)
