"""Repairs that are affine maps of the activations, and such maps folded into the linear layer that they follow.

Torch only, shared by whatever merges a repair into weights.
"""

from dataclasses import dataclass

import torch

from .gating import TurnProjection
from .projection import SafetyProjection

COLUMNS = 1024  # of a weight that are in double precision at once
CONSTANT = "fusion='constant', fusion_weight=0.5"


@dataclass(frozen=True, eq=False)
class Affine:
    """The map ``h' = h - write read^T h + constant``, float64.

    Attributes:
        write: (d, k).
        read: (d, k).
        constant: (d,).
    """

    write: torch.Tensor
    read: torch.Tensor
    constant: torch.Tensor

    @classmethod
    def of(cls, care: SafetyProjection) -> "Affine":
        """The map that a repair is, if `why_not_affine` knows no reason why it is none."""
        parts = [part for part in (care.visual, care.text) if part is not None]
        basis = torch.cat([part.basis.double() for part in parts], dim=1)
        read = torch.cat([part.read_by(torch.float64) for part in parts], dim=1)
        target = torch.cat([part.target(torch.float64) for part in parts])
        if len(parts) == 1:
            fused = basis
        elif care.fusion_mode == "union":
            fused = basis @ care.mixing.double()
        else:
            weight = care.fusion_weight.double()
            ranks = torch.tensor([part.basis.shape[1] for part in parts], device=basis.device)
            fused = basis * torch.stack([weight, 1 - weight]).repeat_interleave(ranks)
        write = (care.strength.double() * fused).cpu()
        return cls(write, read.cpu(), write @ target.cpu())

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """The map of activations (..., d), in float64."""
        h = h.double()
        return h - h @ self.read @ self.write.mT + self.constant

    @property
    def linear(self) -> bool:
        """Whether there is no constant."""
        return not self.constant.any()

    @property
    def identity(self) -> bool:
        """Whether it changes nothing."""
        return self.linear and not self.write.any()

    def folded(self, weight: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """The weight of a linear layer that puts out the mapped activations, but for the constant.

        Args:
            weight: (d, n), or (n, d) if `transposed`; or several in a stack.
            transposed: whether the layer's output is along the last dimension.

        Returns:
            On the CPU, in the weight's dtype, rounded once.
        """
        if weight.ndim > 2:
            return torch.stack([self.folded(one, transposed) for one in weight])
        result = torch.empty(weight.shape, dtype=weight.dtype)
        source, into = (weight.mT, result.mT) if transposed else (weight, result)
        for start in range(0, source.shape[1], COLUMNS):
            columns = source[:, start : start + COLUMNS].cpu().double()
            into[:, start : start + COLUMNS] = columns - self.write @ (self.read.mT @ columns)
        return result


def why_not_affine(care: SafetyProjection | TurnProjection, scope: str) -> tuple[str, str] | None:
    """Why a repair is no affine map of every token, and the setting of a recipe that makes it one; None if it is.

    Args:
        care: the repair of one site.
        scope: which tokens it applies to, "all" or those of the "prompt".
    """
    if care.strength == 0:
        return None
    if isinstance(care, TurnProjection):
        return "it repairs the last token of the prompt and the answer's first tokens, and no others", ""
    both = care.visual is not None and care.text is not None
    if scope != "all":
        return "it repairs the tokens of the prompt alone, and a linear layer cannot tell them", "scope='all'"
    if both and care.fusion_mode in ("adaptive", "printed"):
        return f"fusion {care.fusion_mode!r} weighs the two modalities anew at every token", CONSTANT
    if care.fusion_mode == "route":
        reason = "fusion 'route' repairs visual tokens otherwise than the rest, and a linear layer cannot tell them"
        return reason, CONSTANT if both else "fusion='constant'"
    return None
