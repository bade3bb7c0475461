"""When to repair: the gate that reads a token's own activation, and the repair that follows its decision.

A turn begins at the last token of a prompt. There the gate decides, from that token's activation alone, and what it
decided holds for the answer that follows. Steps count from there: 0 is the last token of the prompt, t the t-th token
of the answer, and -1 a token before any such place.

Torch only, shared by the wrapper and whatever else applies a repair.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
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

    @torch.no_grad()
    def forward(self, h: torch.Tensor, pictured: torch.Tensor, asked: torch.Tensor | None = None) -> torch.Tensor:
        """Where the gate would fire if a prompt ended there.

        Args:
            h: (..., d).
            pictured: bool (...), whether there is an image up to that token.
            asked: bool (...), the tokens that matter; the answer for others may be False whatever they are.

        Returns:
            bool (...); no gradient goes through it.
        """
        if asked is None or not branches_freely(h):
            return self._fires(h, pictured)
        fires = torch.zeros_like(asked)
        if asked.any():
            fires[asked] = self._fires(h[asked], pictured[asked])
        return fires

    def _fires(self, h: torch.Tensor, pictured: torch.Tensor) -> torch.Tensor:
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


def among(ids: torch.Tensor, tokens: Iterable[int]) -> torch.Tensor:
    """Where the ids (...,) are any of `tokens`, bool (...,)."""
    found = [ids == token for token in tokens]
    return functools.reduce(torch.logical_or, found) if found else torch.zeros_like(ids, dtype=torch.bool)


def prompt_ends(ids: torch.Tensor, prompt_end: Sequence[int], earlier: torch.Tensor | None = None) -> torch.Tensor:
    """Where the ids (B, S) end with the ids `prompt_end`, bool (B, S).

    Args:
        ids: of the tokens.
        prompt_end: see `Gate`.
        earlier: ids (B, len(prompt_end) - 1) of those before them, -1 where there are none; None if there are none.
    """
    back, length = len(prompt_end) - 1, ids.shape[1]
    ended = ids == prompt_end[-1]
    if branches_freely(ids) and not ended.any():  # so it is at most tokens of an answer
        return ended
    window = pad(ids, (back, 0), value=-1) if earlier is None else torch.cat([earlier, ids], dim=1)
    for place, token in enumerate(prompt_end[:-1]):
        ended = ended & (window[:, place : place + length] == token)
    return ended


def turn_steps(
    last: torch.Tensor, fires: torch.Tensor | None, before: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps since the last token of the prompt, and whether the gate fired there.

    Args:
        last: bool (B, S), True at the last token of a prompt.
        fires: bool (B, S), True where the gate fires; None for one token more of an answer, which ends no prompt.
        before: what this function returned for the token before these, (B, 1) each; None if there is none.

    Returns:
        ``(steps, held)``, int64 and bool (B, S): in a conversation the latest prompt counts.
    """
    if fires is None:
        earlier, went_on = before
        return torch.where(earlier < 0, earlier, earlier + 1), went_on
    single = last.shape[-1] == 1
    if single:
        steps, held = torch.where(last, 0, -1), fires & last
    else:
        columns = torch.arange(last.shape[-1], device=last.device)
        start = torch.where(last, columns, -1).cummax(dim=-1).values
        steps = torch.where(start >= 0, columns - start, -1)
        held = fires.gather(-1, start.clamp(min=0)) & (start >= 0)
    if before is None:
        return steps, held
    earlier, went_on = before
    next_step = torch.where(earlier < 0, -1, earlier + 1 if single else earlier + 1 + columns)
    return torch.where(steps < 0, next_step, steps), torch.where(steps < 0, went_on, held)


def pack(steps: torch.Tensor, held: torch.Tensor, pictured: torch.Tensor) -> torch.Tensor:
    """What must be remembered of a token, in one int64 each: 0 of one before any prompt and image; see `unpack`."""
    return (steps + 1) * 4 + held * 2 + pictured


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(steps, held, pictured)``, int64, bool and bool, from what `pack` gave."""
    return packed // 4 - 1, packed & 2 > 0, packed & 1 > 0


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
        tokens, flat, last = h.reshape(-1, h.shape[-1]), steps.reshape(-1), self._last_step()
        if self.strength == 0:
            return h
        if len(flat) == 1:
            step = int(flat)
            return self._at(h, step) if 0 <= step <= last else h
        rows = ((flat >= 0) & (flat <= last)).nonzero()[:, 0]
        if not len(rows):
            return h
        return tokens.index_copy(0, rows, self._everywhere(tokens[rows], flat[rows])).reshape(h.shape)

    def _last_step(self) -> int:
        return 0 if self.response is None else len(self.response.mean)

    def _at(self, h: torch.Tensor, step: int) -> torch.Tensor:
        """The same for a token of a known step: one of an answer, mostly."""
        part = self.response if step else self.last
        if part is None:
            return h
        work = h.to(torch.promote_types(h.dtype, torch.float32))
        anchor = part.beta * (part.mean[step - 1] if step else part.mean)
        coefficients = self.strength * ((anchor - work) @ part.read_by(work.dtype))
        return (work + coefficients @ part.basis.to(work.dtype).mT).to(h.dtype)

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
