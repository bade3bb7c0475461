"""When to repair: the gate that reads a token's own activation, and the repair that follows its decision.

A turn begins at the last token of a prompt. There the gate decides, from that token's activation alone, and what it
decided holds for the answer that follows. Steps count from there: 0 is the last token of the prompt, t the t-th token
of the answer, and -1 a token before any such place.

Torch only, shared by the wrapper and whatever else applies a repair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from .projection import FixedPrecision, ModalityProjection, Subspace, branches_freely, full_precision

TURN = ("last", "response")  # what a `TurnProjection` repairs: the last token of the prompt, and the answer


@dataclass(frozen=True, eq=False)
class Gate:
    """Linear detectors of one site's activations, each with a threshold, asked where a prompt ends.

    With scores ``s = readers^T h`` of the last token of a prompt the gate fires if all of the first `required` scores
    exceed their thresholds, and so does any of the alarms that follow; `pictured` further alarms take their place for
    prompts with an image. Without alarms it fires if what is required agrees.

    Attributes:
        prompt_end: the token ids that end every prompt: the generation prompt of the chat template.
        readers: (d, required + alarms + pictured).
        thresholds: (required + alarms + pictured,).
        required: how many detectors must all agree.
        pictured: how many alarms there are for prompts with an image alone; 0 if all prompts share theirs.

    Raises:
        ValueError: shapes do not fit, or a value is not finite.
    """

    prompt_end: tuple[int, ...]
    readers: torch.Tensor
    thresholds: torch.Tensor
    required: int = 0
    pictured: int = 0

    def __post_init__(self):
        object.__setattr__(self, "prompt_end", tuple(map(int, self.prompt_end)))
        for name in ("readers", "thresholds"):
            object.__setattr__(self, name, getattr(self, name).detach().to(torch.float32))
        columns = self.readers.shape[-1] if self.readers.ndim == 2 else -1
        least = self.required + self.pictured
        if min(self.required, self.pictured) < 0 or least > columns or self.thresholds.shape != (columns,):
            raise ValueError(
                f"readers {tuple(self.readers.shape)}, thresholds {tuple(self.thresholds.shape)} and "
                f"required={self.required}, pictured={self.pictured} do not fit; expected (d, n) and (n,) with n of at "
                "least both."
            )
        if not self.prompt_end or min(self.prompt_end) < 0:
            raise ValueError(f"prompt_end={self.prompt_end} must be token ids, at least one.")
        if not torch.isfinite(self.readers).all() or not torch.isfinite(self.thresholds).all():
            raise ValueError("A reader or threshold of the gate is not finite; the fit or its file is broken.")

    @property
    def alarms(self) -> int:
        """How many alarms there are for prompts without an image, or for all."""
        return self.readers.shape[1] - self.required - self.pictured

    def ungated(self) -> "Gate":
        """The same gate without detectors: it fires at the end of every prompt."""
        return Gate(self.prompt_end, self.readers[:, :0], self.thresholds[:0])


class GateReader(FixedPrecision):
    """The buffers of a `Gate`, float32, persistent and NaN until loaded: `readers`, `thresholds`."""

    def __init__(self, dimension: int, required: int, alarms: int, pictured: int):
        super().__init__()
        self.required, self.pictured = required, pictured
        columns = required + alarms + pictured
        self.register_buffer("readers", torch.full((dimension, columns), torch.nan, dtype=torch.float32))
        self.register_buffer("thresholds", torch.full((columns,), torch.nan, dtype=torch.float32))

    @classmethod
    def from_gate(cls, gate: Gate) -> "GateReader":
        """On the device of the gate's tensors."""
        module = cls(gate.readers.shape[0], gate.required, gate.alarms, gate.pictured).to(gate.readers.device)
        module.readers.copy_(gate.readers)
        module.thresholds.copy_(gate.thresholds)
        return module

    def margins(self, h: torch.Tensor) -> torch.Tensor:
        """How far the scores of h (..., d) are above their thresholds, (..., required + alarms + pictured)."""
        readers = full_precision(self.readers)
        return h.to(readers.dtype) @ readers - self.thresholds

    def forward(self, h: torch.Tensor, pictured: torch.Tensor) -> torch.Tensor:
        """Where the gate would fire if a prompt ended there.

        Args:
            h: (..., d).
            pictured: bool (...), whether there is an image up to that token.

        Returns:
            bool (...).
        """
        above = self.margins(h) > 0
        fires = above[..., : self.required].all(dim=-1)
        shared, own = above[..., self.required :].split(
            [above.shape[-1] - self.required - self.pictured, self.pictured], dim=-1
        )
        if self.pictured:
            return fires & torch.where(pictured, own.any(dim=-1), shared.any(dim=-1))
        return fires & shared.any(dim=-1) if shared.shape[-1] else fires

    def check(self) -> None:
        """Assert that every buffer holds what it should.

        Raises:
            ValueError: a buffer is not finite.
        """
        Gate((0,), self.readers, self.thresholds, self.required, self.pictured)


def prompt_ends(ids: torch.Tensor, prompt_end: Sequence[int]) -> torch.Tensor:
    """Where the ids (B, S) end with the ids `prompt_end`, bool (B, S)."""
    found = torch.ones_like(ids, dtype=torch.bool)
    for back, token in enumerate(reversed(prompt_end)):
        found = found & pad(ids == token, (back, 0))[:, : ids.shape[1]]
    return found


def turn_steps(last: torch.Tensor, fires: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps since the last token of the prompt, and whether the gate fired there.

    Args:
        last: bool (B, S), True at the last token of a prompt.
        fires: bool (B, S), True where the gate fires.

    Returns:
        ``(steps, held)``, int64 and bool (B, S): in a conversation the latest prompt counts.
    """
    columns = torch.arange(last.shape[-1], device=last.device)
    start = torch.where(last, columns, -1).cummax(dim=-1).values
    steps = torch.where(start >= 0, columns - start, -1)
    return steps, fires.gather(-1, start.clamp(min=0)) & (start >= 0)


class TurnProjection(FixedPrecision):
    """The repair of one site at the last token of the prompt and at the first tokens of the answer.

    Each place has a `Subspace` of its own: ``h' = h + B R^T (beta m - h)``, m the anchor; that of the answer holds one
    anchor per step and ends with them.

    Args:
        dimension: d.
        ranks: rank per place; one or both of `TURN`.
        steps: T, the number of answer tokens that are repaired.
        oblique: the places whose projector is oblique.

    Buffers are float32 whatever the model's dtype, persistent, and NaN until loaded.

    Raises:
        ValueError: no such place, or an answer without steps.
    """

    def __init__(self, dimension: int, ranks: Mapping[str, int], steps: int = 0, oblique=()):
        super().__init__()
        if not ranks or set(ranks) - set(TURN):
            raise ValueError(f"Subspaces are given for {sorted(ranks)}; expected one or both of {TURN}.")
        if ("response" in ranks) != (steps > 0):
            raise ValueError(f"steps={steps} must be positive with a subspace of the response, and 0 without.")
        for name in TURN:
            per_step = steps if name == "response" else 0
            self.add_module(
                name, ModalityProjection(dimension, ranks[name], name in oblique, per_step) if name in ranks else None
            )
        self.register_buffer("strength", torch.tensor(torch.nan, dtype=torch.float32))

    @classmethod
    def from_subspaces(cls, subspaces: Mapping[str, Subspace], strength: float = 1.0) -> "TurnProjection":
        """Build the repair of a site from its subspaces, on their device.

        Raises:
            ValueError: the two subspaces differ in d, or the response has no anchors per step.
        """
        dimensions = {subspace.basis.shape[0] for subspace in subspaces.values()}
        if len(dimensions) != 1:
            raise ValueError(f"The subspaces of a site must share one hidden size; got {sorted(dimensions)}.")
        steps = subspaces["response"].steps if "response" in subspaces else 0
        oblique = [name for name, subspace in subspaces.items() if subspace.reader is not None]
        device = next(iter(subspaces.values())).basis.device
        module = cls(dimensions.pop(), {name: s.rank for name, s in subspaces.items()}, steps, oblique).to(device)
        for name, subspace in subspaces.items():
            getattr(module, name).load(subspace)
        module.strength.fill_(strength)
        return module

    def forward(self, h: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Repair activations.

        Args:
            h: (..., d), any floating dtype; computed in float32 at least.
            steps: int64 (...), as `turn_steps` gives them, -1 where the gate did not fire.

        Returns:
            (..., d) in h's dtype; exactly h at every token that is not repaired.
        """
        if not branches_freely(h):
            return self._everywhere(h, steps)
        # Few tokens are repaired, mostly none.
        last = 0 if self.response is None else len(self.response.mean)
        rows = ((steps >= 0) & (steps <= last)).reshape(-1).nonzero()[:, 0]
        if not len(rows) or self.strength == 0:
            return h
        tokens = h.reshape(-1, h.shape[-1])
        return tokens.index_copy(0, rows, self._everywhere(tokens[rows], steps.reshape(-1)[rows])).reshape(h.shape)

    def _everywhere(self, h: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """The same, computed at every token."""
        work = h.to(torch.promote_types(h.dtype, torch.float32))
        repaired, touched = work, torch.zeros_like(steps, dtype=torch.bool)
        for name in TURN:
            part = getattr(self, name)
            if part is None:
                continue
            target = part.target(work.dtype)
            if name == "last":
                here = steps == 0
            else:
                here = (steps >= 1) & (steps <= len(target))
                target = target[(steps - 1).clamp(0, len(target) - 1)]
            coefficients = (target - work @ part.read_by(work.dtype)) * (self.strength * here).to(work.dtype)[..., None]
            repaired = repaired + coefficients @ part.basis.to(work.dtype).mT
            touched = touched | here
        # Not merely adding zero: that would turn -0.0 into 0.0 and an infinite activation into NaN.
        return torch.where((touched & (self.strength != 0))[..., None], repaired.to(h.dtype), h)

    def subspaces(self) -> dict[str, Subspace]:
        """The buffers as checked subspaces, by place."""
        return {name: getattr(self, name).subspace() for name in TURN if getattr(self, name) is not None}

    def check(self) -> None:
        """Assert that every buffer holds what it should.

        Raises:
            ValueError: a buffer is not finite, or a basis is not orthonormal.
        """
        self.subspaces()
        if not torch.isfinite(self.strength):
            raise ValueError("The buffer `strength` is not finite.")
