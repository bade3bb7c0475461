"""The gate's memory where an engine keeps keys and values of many requests in pages: torch only, no engine.

Every slot of the cache has two numbers more, the id of its token and what `gating.pack` keeps of it. What is known of a
token follows from the tokens before it alone, so a slot's numbers are as good as its keys: a prompt may come in chunks,
share its beginning with another's, be thrown out and computed again, and nothing need know.

All shapes are those of the batch, and nothing waits for a GPU, so that a graph can be recorded of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .gating import GateReader, among, pack, prompt_ends, turn_steps, unpack

WIDTH = 2  # numbers a slot: the id, and what is packed


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """Where the N tokens of a batch belong, R requests one after the other, and perhaps padding behind them.

    Attributes:
        starts: (R + 1,), the first token of each request; the last is the number of tokens.
        lengths: (R,), of each request with what is in the cache and in this batch.
        slots: (N,), the slot of each token, negative for padding.
        blocks: (R, B), the blocks of each request in order.
        block_size: slots a block.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor
    blocks: torch.Tensor
    block_size: int

    def __post_init__(self):
        rows, starts = len(self.lengths), len(self.starts)
        if starts != rows + 1 or len(self.blocks) != rows or self.block_size < 1:
            raise ValueError(
                f"{rows} lengths, {starts} starts, {len(self.blocks)} rows of blocks and blocks of {self.block_size} "
                "slots do not fit; expected R, R + 1, R and at least 1."
            )

    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(rows, offsets, positions)``, int64 (N,): each token's request, its place in the batch and in the text."""
        tokens = torch.arange(len(self.slots), device=self.slots.device)
        rows = torch.searchsorted(self.starts[1:].contiguous(), tokens.to(self.starts.dtype), right=True)
        rows = rows.clamp(max=len(self.lengths) - 1)  # padding goes to the last
        offsets = tokens - self.starts[rows]
        counts = self.starts[rows + 1] - self.starts[rows]
        return rows, offsets, self.lengths[rows] - counts + offsets

    def slots_of(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The slots of `positions` of the requests `rows`, both (...,); of what is not there, some slot or other."""
        inside = positions.clamp(0, self.blocks.shape[1] * self.block_size - 1).long()
        return self.blocks[rows, inside // self.block_size].long() * self.block_size + inside % self.block_size


def advance(
    cache: torch.Tensor,
    batch: PagedBatch,
    ids: torch.Tensor,
    h: torch.Tensor,
    gate: GateReader,
    prompt_end: Sequence[int],
    images: Sequence[int],
) -> torch.Tensor:
    """Have the gate decide on a batch, and write down what it decided.

    Args:
        cache: int64 (blocks, block_size, 2), changed in place; a view of any strides. Its first block is nobody's:
            what is written of padding goes there.
        batch: of N tokens.
        ids: (N,), of the tokens; placeholders for those of images.
        h: (N, d), the activations that the gate reads.
        gate: the detectors.
        prompt_end: see `gating.Gate`.
        images: the ids of placeholders.

    Returns:
        int64 (N,), as `gating.pack` packs it; of padding, anything.
    """
    rows, offsets, positions = batch.places()
    own = batch.slots.long().clamp(min=0)
    _write(cache, own, batch.block_size, 0, ids)
    ends = _ends(cache, batch, rows, positions, prompt_end)

    first = positions - offsets
    before = _read(cache, batch.slots_of(rows, first - 1), batch.block_size, 1)
    earlier, went_on, seen = unpack(torch.where(first > 0, before, 0))

    pictured = seen | _since_start(among(ids, images), offsets)
    steps, held = turn_steps(ends[None], gate(h, pictured, ends)[None])
    steps, held = steps[0], held[0]
    here = (steps >= 0) & (steps <= offsets)  # and not a prompt of the request before this one
    steps = torch.where(here, steps, torch.where(earlier < 0, -1, earlier + 1 + offsets))
    packed = pack(steps, torch.where(here, held, went_on), pictured)
    _write(cache, own, batch.block_size, 1, packed)
    return packed


def _ends(cache, batch: PagedBatch, rows, positions, prompt_end: Sequence[int]) -> torch.Tensor:
    """Where prompts end, bool (N,): the last ids of each token are read back, whichever batch they came in."""
    back = torch.arange(1 - len(prompt_end), 1, device=positions.device)
    places = positions[:, None] + back
    window = _read(cache, batch.slots_of(rows[:, None].expand_as(places), places), batch.block_size, 0)
    return prompt_ends(torch.where(places >= 0, window, -1), prompt_end)[:, -1]


def _since_start(found: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Whether anything was found up to a token in its request's part of the batch, bool (N,)."""
    tokens = torch.arange(len(found), device=found.device)
    return torch.where(found, tokens, -1).cummax(dim=0).values >= tokens - offsets


def _read(cache: torch.Tensor, slots: torch.Tensor, size: int, which: int) -> torch.Tensor:
    return cache[(slots // size).clamp(0, len(cache) - 1), slots % size, which]


def _write(cache: torch.Tensor, slots: torch.Tensor, size: int, which: int, values: torch.Tensor) -> None:
    cache[slots // size, slots % size, which] = values.to(cache.dtype)
