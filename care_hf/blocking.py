"""Take away what one place in a decoder adds to the residual stream, and see what the model then answers."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import logging

from .devices import input_device
from .interventions import contribution, rewritten, with_contribution
from .reading import reading
from .samples import Sample, batches, collate
from .sites import Site, hidden_size

MODES = ("zero", "mean", "resample")
POOL = 512  # contributions that are kept of each site to draw from
ROW_STRIDE, COLUMN_STRIDE = 7919, 104729  # primes, so that neighbouring rows and columns draw from all over the pool


@dataclass(frozen=True, eq=False)
class Contributions:
    """What sites add to the residual stream at the tokens of benign prompts.

    Attributes:
        mean: float32 (d,) by site, over all prompt tokens.
        pool: float32 (n, d) by site, of some tokens, n at most `POOL`.
    """

    mean: Mapping[Site, torch.Tensor]
    pool: Mapping[Site, torch.Tensor]


@torch.no_grad()
def collect_contributions(
    model: nn.Module, processor, prompts: Sequence, sites: Sequence[Site], batch_size: int = 16, seed: int = 0
) -> Contributions:
    """Run benign prompts (anything with chat `messages`) and keep what `sites` add at their tokens."""
    width, generator = hidden_size(model), torch.Generator().manual_seed(seed)
    sums = {site: torch.zeros(width, dtype=torch.float64) for site in sites}
    pools: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
    counted, share = 0, max(1, POOL // len(prompts))
    for part in logging.tqdm(list(batches(prompts, batch_size)), desc="Reading benign", unit="batch", leave=False):
        batch = collate(processor, [Sample(s.messages) for s in part], (), padding_side="right")
        inputs = {name: value.to(input_device(model)) for name, value in batch.inputs.items()}
        there = inputs["attention_mask"].bool()
        added = _contributions(model, sites, inputs)
        counts = there.sum(dim=1).cpu()
        # The same tokens at every site, some of each prompt.
        chosen = torch.stack([torch.randint(int(n), (share,), generator=generator) for n in counts])
        rows = torch.arange(len(part))[:, None]
        for site, values in added.items():
            values = values.float()
            sums[site] += values[there].double().sum(dim=0).cpu()
            pools[site].append(values[rows, chosen].flatten(0, 1).cpu())
        counted += int(counts.sum())
    mean = {site: (total / counted).float() for site, total in sums.items()}
    return Contributions(mean, {site: torch.cat(parts)[:POOL] for site, parts in pools.items()})


def _contributions(model, sites: Sequence[Site], inputs) -> dict[Site, torch.Tensor]:
    found: dict[Site, torch.Tensor] = {}

    def note(site: Site):
        def keep(output, stream):
            found[site] = contribution(site, output, stream)
            return output

        return keep

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(rewritten(model, site, note(site)))
        stack.enter_context(reading(model, max(site.layer for site in sites)))
        model.base_model(**inputs, use_cache=False)
    return found


class Blocker:
    """What a blocked site adds instead.

    Under "resample" each token gets the contribution of a benign token that depends on the seed, the site, the prompt's
    number and the token's place counted from the end of the prompt, so that batches and padding do not matter.

    Args:
        site: the place.
        mode: "zero" adds nothing, "mean" the benign mean, "resample" what a random benign token got.
        contributions: of benign prompts; None for "zero".
        seed: of the draws.

    Raises:
        ValueError: the mode is not known, or needs contributions.
    """

    def __init__(self, site: Site, mode: str, contributions: Contributions | None = None, seed: int = 0):
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not known; choose one of {MODES}.")
        if mode != "zero" and (contributions is None or site not in contributions.mean):
            raise ValueError(f"mode={mode!r} needs benign contributions of site {site}; collect them, or use 'zero'.")
        self.site, self.mode = site, mode
        self._mean = contributions.mean[site] if mode == "mean" else None
        self._pool = contributions.pool[site] if mode == "resample" else None
        self._first = int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(seed + site.layer)))
        self._numbers = self._columns = torch.zeros(0, dtype=torch.int64)

    def place(self, numbers: torch.Tensor, columns: torch.Tensor) -> None:
        """Say where the next forward is.

        Args:
            numbers: int64 (B,), which prompts its rows are.
            columns: int64 (B, S), places of its tokens from the end of the prompt: -1 is its last token, 0 the first of
                the answer.
        """
        self._numbers, self._columns = numbers, columns

    def value(self) -> torch.Tensor:
        """What is added: a scalar, (d,) or (B, S, d)."""
        if self.mode == "zero":
            return torch.zeros(())
        if self.mode == "mean":
            return self._mean
        draws = self._first + self._numbers[:, None] * ROW_STRIDE + self._columns * COLUMN_STRIDE
        return self._pool[draws.remainder(len(self._pool))]

    def rewrite(self, output: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """An `interventions.Rewrite`."""
        return with_contribution(self.site, self.value(), stream)


@torch.no_grad()
def generate_blocked(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], blocker: Blocker | None, numbers: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy answers under a block by the model's own `generate`: the plain way, which works for every model.

    Args:
        model: any that generates.
        inputs: left-padded, see `samples.collate`.
        blocker: what is blocked; None blocks nothing.
        numbers: int64 (B,), which prompts these are.
        tokens: of an answer, at most.

    Returns:
        Token ids (B, at most `tokens`), and the logits of the first (B, vocabulary).
    """
    inputs = {name: value.to(input_device(model)) for name, value in inputs.items()}
    length = inputs["input_ids"].shape[1]
    seen = -length

    def rewrite(output, stream):
        nonlocal seen
        columns = torch.arange(seen, seen + stream.shape[1]).expand(len(stream), -1)
        blocker.place(numbers, columns)
        seen += stream.shape[1]
        return blocker.rewrite(output, stream)

    options = {"do_sample": False, "max_new_tokens": tokens, "output_logits": True, "return_dict_in_generate": True}
    if blocker is None:
        found = model.generate(**inputs, **options)
    else:
        with rewritten(model, blocker.site, rewrite):
            found = model.generate(**inputs, **options)
    return found.sequences[:, length:], found.logits[0]
