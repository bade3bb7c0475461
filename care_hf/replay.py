"""Answers under many blocks for a fraction of the work: each begins where it first differs from the undisturbed run.

Blocking layer l leaves everything below it as it was, and mostly the answer, too. So the undisturbed run of a batch is
kept (`undisturbed.Undisturbed`): what entered every layer, what attention put out, keys and values. A blocked run takes
up what entered layer l, runs prompt and undisturbed answer through the layers from there in one forward, and generates
anew only from the first token that differs (as in speculative decoding, which is exact for greedy answers). The last
layer's FFN is left out where nothing reads it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .blocking import Blocker
from .interventions import forward_replaced, rewritten
from .sites import Site, output_tensor, replace_output
from .undisturbed import ATTENTION, NotReplayable, Undisturbed, cache_keyword, inner

__all__ = ["NotReplayable", "Replay"]

FFN = ("mlp", "feed_forward", "block_sparse_moe")
WAITING = 2  # times the batch: answers that may wait to be finished together, against memory
TOLERANCE = 0.05  # of the spread of a token's logits: what rounding may change, in half precision too


@dataclass(frozen=True, eq=False)
class _Changed:
    """Answers of one batch under one block, up to where they differ from the undisturbed ones.

    Attributes:
        blocker: the block.
        first: (B, vocabulary), logits of the first token.
        rows: int64 (b,), which prompts are answered differently.
        at: int64 (b,), from which token on.
        token: int64 (b,), what that token is.
        mask: (b, S), which tokens of prompt and draft are in it.
        cache: keys and values of these rows.
    """

    blocker: Blocker
    first: torch.Tensor
    rows: torch.Tensor
    at: torch.Tensor
    token: torch.Tensor
    mask: torch.Tensor
    cache: DynamicCache


class Replay:
    """The undisturbed greedy answers of one batch, and those under blocks.

    Args:
        model: in evaluation mode.
        inputs: left-padded, see `samples.collate`.
        numbers: int64 (B,), which prompts these are; for `blocking.Blocker`.
        tokens: of an answer, at most.

    Attributes:
        answers: int64 (B, T), padded after the end of each.
        first: (B, vocabulary), logits of the first token.

    Raises:
        NotReplayable: as `Undisturbed`.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], numbers: torch.Tensor, tokens: int):
        self.model, self.numbers = model, numbers
        self.base = Undisturbed(model, inputs, tokens)
        self.answers, self.first = self.base.answers, self.base.first

    def agrees(self) -> bool:
        """Whether prompts with their undisturbed answers, read at once as under blocks, lead to these same answers."""
        with self._replayed(Site(0, "ffn")) as cache:
            logits = self._read(cache)
        allowed = TOLERANCE * _spread(logits)
        best, said = logits.max(dim=-1).values, logits.gather(-1, self.answers[..., None])[..., 0]
        same = (best - said <= allowed) | ~self._said()
        off = (logits[:, 0] - self.first).float().square().mean(dim=-1).sqrt()
        return bool(same.all() and (off <= allowed[:, 0]).all())

    def blocked(self, blockers: Iterable[Blocker]) -> Iterator[tuple[Blocker, torch.Tensor, torch.Tensor]]:
        """Answers under each block, as soon as they are known.

        Yields:
            The block, token ids (B, at most `tokens`), padded after their end, and the logits of the first
            (B, vocabulary).
        """
        waiting: list[_Changed] = []
        for blocker in blockers:
            changed = self._judge_draft(blocker)
            if sum(len(one.rows) for one in [*waiting, changed]) > WAITING * len(self.answers):
                yield from self._finish(waiting)
                waiting = []
            waiting.append(changed)
        yield from self._finish(waiting)

    def _said(self) -> torch.Tensor:
        """Which tokens of the undisturbed answers count: those up to and with the end, bool (B, T)."""
        ends = torch.isin(self.answers, self.base.ends).int()
        return ends.cumsum(dim=1) - ends == 0

    @torch.no_grad()
    def _read(self, cache: DynamicCache) -> torch.Tensor:
        """Logits (B, T, vocabulary) of every token of the answers, prompts and undisturbed answers read at once."""
        draft, base = self.answers, self.base
        later = torch.arange(1, draft.shape[1], device=draft.device)
        # The last token of the answers was read by no forward.
        shown = torch.cat([base.mask, self._said()[:, :-1].to(base.mask)], dim=1)
        place = torch.cat([base.positions, base.positions[..., -1:] + later], dim=-1)
        ids = torch.cat([base.ids, draft[:, :-1]], dim=1)
        inputs = {"input_ids": ids, "attention_mask": shown, "position_ids": place}
        inputs[cache_keyword(self.model)] = cache
        return self.model(**inputs, use_cache=True, logits_to_keep=draft.shape[1]).logits

    @torch.no_grad()
    def _judge_draft(self, blocker: Blocker) -> _Changed:
        """Where the answers under a block first differ from the undisturbed ones."""
        draft, mask = self.answers, self.base.mask
        steps = torch.arange(draft.shape[1], device=draft.device)
        blocker.place(self.numbers, torch.arange(-mask.shape[1], len(steps) - 1).expand(len(mask), -1))
        with self._replayed(blocker.site) as cache, rewritten(self.model, blocker.site, blocker.rewrite):
            logits = self._read(cache)
        best = logits.argmax(dim=-1)
        differs = (best != draft) & self._said()
        rows = differs.any(dim=1).nonzero()[:, 0]
        at = differs[rows].int().argmax(dim=1)
        cache.batch_select_indices(rows)
        kept = torch.cat([mask[rows], (steps[:-1] < at[:, None]).to(mask)], dim=1)
        return _Changed(blocker, logits[:, 0], rows, at, best[rows, at], kept, cache)

    @torch.no_grad()
    def _finish(self, waiting: Sequence[_Changed]) -> Iterator[tuple[Blocker, torch.Tensor, torch.Tensor]]:
        """Generate what has changed under several blocks at once, each acting on its own rows."""
        cuts = [0, *accumulate(len(one.rows) for one in waiting)]
        parts = [(one, slice(begin, end)) for one, (begin, end) in zip(waiting, pairwise(cuts), strict=True)]
        blocked = [(one.blocker, part) for one, part in parts if len(one.rows)]
        new = torch.zeros(0, 0)
        if blocked:
            rows, at, token, mask = (
                torch.cat([getattr(one, name) for one in waiting]) for name in ("rows", "at", "token", "mask")
            )
            cache = _joined_caches([one.cache for one in waiting if len(one.rows)])

            def place(steps):
                for blocker, part in blocked:
                    blocker.place(self.numbers[rows[part].cpu()], steps[part].cpu()[:, None])

            with ExitStack() as stack:
                for blocker, part in blocked:
                    stack.enter_context(rewritten(self.model, blocker.site, _of_rows(blocker, part)))
                new = self.base.go_on(token, at, mask, cache, self.base.positions[..., rows, -1:], place)
        for one, part in parts:
            yield one.blocker, self._changed(one, new[part]) if len(one.rows) else self.answers, one.first

    def _changed(self, one: _Changed, new: torch.Tensor) -> torch.Tensor:
        """The undisturbed answers, in some rows with other tokens from some place on."""
        tokens = self.base.tokens
        whole = self.answers.new_full((len(self.answers), tokens + new.shape[1]), self.base.pad)
        whole[:, : self.answers.shape[1]] = self.answers
        places = torch.arange(whole.shape[1], device=whole.device)
        for row, begin, said in zip(one.rows.tolist(), one.at.tolist(), new, strict=True):
            whole[row, places >= begin] = self.base.pad
            whole[row, begin : begin + len(said)] = said
        return whole[:, :tokens]

    @contextmanager
    def _replayed(self, site: Site) -> Iterator[DynamicCache]:
        """While entered, a forward of `_read` with the cache given computes only what a block of `site` changes."""
        base, layer = self.base, self.base.layers[site.layer]
        cache = DynamicCache()
        cache.layers.extend(DynamicLayer() for _ in base.layers)
        changed: dict[nn.Module, Callable] = {}
        # Layers below the block, whose output nothing reads, and one that is blocked as a whole.
        for index in range(site.layer + (site.component == "residual")):
            changed[base.layers[index]] = self._passed(index, cache)
        attention = inner(layer, ATTENTION)
        if site.component != "residual" and attention:
            changed[attention] = self._attention(site.layer, attention, cache)
        last = base.layers[-1]
        if (ffn := inner(last, FFN)) and site != Site(len(base.layers) - 1, "residual"):
            changed[ffn] = self._trimmed(ffn)

        def enter(module, args, kwargs):  # what entered it in the undisturbed run
            entered = base.entered[site.layer]
            return ((entered, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entered})

        with ExitStack() as stack:
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for module, forward in changed.items():
                stack.enter_context(forward_replaced(module, forward))
            yield cache

    def _update(self, index: int, cache: DynamicCache) -> None:
        # Put there rather than added, which would copy them; nothing writes into them.
        kept, new = self.base.cache.layers[index], cache.layers[index]
        new.lazy_initialization(kept.keys, kept.values)
        new.keys, new.values = kept.keys, kept.values

    def _passed(self, index: int, cache: DynamicCache) -> Callable:
        def forward(hidden_states, *args, **kwargs):
            self._update(index, cache)
            return replace_output(self.base.outputs[self.base.layers[index]], hidden_states)

        return forward

    def _attention(self, index: int, attention: nn.Module, cache: DynamicCache) -> Callable:
        """The attention of the block's layer, as it was; where it is what is blocked, its output is replaced later."""

        def forward(*args, **kwargs):
            self._update(index, cache)
            return replace_output(self.base.outputs[attention], self.base.attended[index])

        return forward

    def _trimmed(self, ffn: nn.Module) -> Callable:
        """The last FFN, at the tokens alone whose logits are asked for; elsewhere 0, which nothing reads."""
        run, before = ffn.forward, self.base.mask.shape[1] - 1

        def forward(hidden_states, *args, **kwargs):
            if hidden_states.ndim != 3 or hidden_states.shape[1] <= before:
                return run(hidden_states, *args, **kwargs)
            found = run(hidden_states[:, before:].contiguous(), *args, **kwargs)
            if output_tensor(found).ndim != 3:  # of (B * S, d)
                return run(hidden_states, *args, **kwargs)
            return replace_output(found, nn.functional.pad(output_tensor(found), (0, 0, before, 0)))

        return forward


def _spread(logits: torch.Tensor) -> torch.Tensor:
    """Standard deviation over tokens that can be said at all, float32 (...); Chameleon says no pieces of images."""
    wide, said = logits.float(), logits > torch.finfo(logits.dtype).min
    count = said.sum(dim=-1)
    mean = wide.masked_fill(~said, 0).sum(dim=-1) / count
    return ((wide - mean[..., None]).masked_fill(~said, 0).square().sum(dim=-1) / (count - 1).clamp_min(1)).sqrt()


def _of_rows(blocker: Blocker, rows: slice) -> Callable:
    """A block of some rows alone."""

    def rewrite(output, stream):
        changed = output.clone()
        changed[rows] = blocker.rewrite(output[rows], stream[rows]).to(output.dtype)
        return changed

    return rewrite


def _joined_caches(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache of the rows of all, in the first of them."""
    for index, layer in enumerate(caches[0].layers):
        layer.keys = torch.cat([cache.layers[index].keys for cache in caches])
        layer.values = torch.cat([cache.layers[index].values for cache in caches])
    return caches[0]
