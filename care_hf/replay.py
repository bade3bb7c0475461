"""Answers under many blocks for a fraction of the work: each begins where it first differs from the undisturbed run.

Blocking layer l leaves everything below it as it was, and mostly the answer, too. So the undisturbed run of a batch is
kept (`Replay`): what entered every layer, what attention put out, keys and values. A blocked run takes up what entered
layer l, runs prompt and undisturbed answer through the layers from there in one forward, and generates anew only from
the first token that differs (as in speculative decoding, which is exact for greedy answers). The last layer's FFN is
left out where nothing reads it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .blocking import Blocker
from .interventions import rewritten
from .sites import Site, decoder_layers, output_tensor, replace_output

ATTENTION, FFN = ("self_attn", "self_attention", "attention"), ("mlp", "feed_forward", "block_sparse_moe")
# What `generate` may do to logits beside taking the largest; where none of it is on, a plain loop gives its answers.
PLAIN = {"repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0), "num_beams": (None, 1)}
PLAIN |= {"min_length": (None, 0), "guidance_scale": (None, 1.0), "encoder_repetition_penalty": (None, 1.0)}
UNUSED = """bad_words_ids sequence_bias suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
min_new_tokens exponential_decay_length_penalty watermarking_config penalty_alpha stop_strings"""

WAITING = 2  # times the batch: answers that may wait to be finished together, against memory


class NotReplayable(ValueError):
    """The model does something that a replay would leave out; generate its answers the plain way."""


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
        NotReplayable: the model keeps other state than keys and values of all tokens, or decodes otherwise than
            greedily.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], numbers: torch.Tensor, tokens: int):
        self.model, self.numbers, self._tokens = model, numbers, tokens
        self.layers = decoder_layers(model)
        self._inputs = {name: value.to(model.device) for name, value in inputs.items()}
        self._length = inputs["input_ids"].shape[1]
        self._ends, self._pad = _end_tokens(model)
        self._entered: list[list[torch.Tensor]] = [[] for _ in self.layers]
        self._attended: list[list[torch.Tensor]] = [[] for _ in self.layers]
        self._outputs: dict[nn.Module, Any] = {}  # how attention and layers return theirs: alone, or in a tuple
        with self._recorded():
            self.answers, self.first = self._generate()
        self._entered = [torch.cat(parts, dim=1) for parts in self._entered]
        self._attended = [torch.cat(parts, dim=1) for parts in self._attended if parts]

    @torch.no_grad()
    def _generate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Answer the batch, and keep its cache and positions."""
        seen: list[torch.Tensor] = []

        def note(module, args, kwargs):
            if isinstance(kwargs.get("position_ids"), torch.Tensor):
                seen.append(kwargs["position_ids"])

        mask = self._inputs["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        # The model's own positions, where it makes them from what is in the prompt.
        own = {} if "image_grid_thw" in self._inputs else {"position_ids": positions}
        handle = self.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        try:
            found = self.model(**self._inputs, **own, use_cache=True, logits_to_keep=1)
        finally:
            handle.remove()
        self._positions = seen[0] if seen else positions
        if self._positions.shape[-2:] != mask.shape:
            raise NotReplayable(f"its positions have the shape {tuple(self._positions.shape)}.")
        self._cache = found.past_key_values
        if not isinstance(self._cache, DynamicCache) or {type(c) for c in self._cache.layers} != {DynamicLayer}:
            raise NotReplayable(f"it keeps its state in a {type(self._cache).__name__} of other layers.")
        if len(self._cache.layers) != len(self.layers):
            raise NotReplayable(f"it caches {len(self._cache.layers)} of its {len(self.layers)} layers.")
        first = found.logits[:, -1]
        steps = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
        return self._continue(first.argmax(dim=-1), steps, mask, self._cache, self._positions[..., -1:]), first

    def _continue(self, token, steps, mask, cache, position, blocked=(), rows=None) -> torch.Tensor:
        """Greedy answers from a first token (b,), that is token `steps` (b,) of each row's answer.

        Each block of `blocked` acts on a slice of the rows, that is on the prompts `rows` (b,).
        """
        said, ended = [token], torch.zeros(len(token), dtype=torch.bool, device=token.device)
        while True:
            ended = ended | torch.isin(said[-1], self._ends)
            done = ended | (steps + len(said) >= self._tokens)
            if bool(done.all()):
                return torch.stack(said, dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            at = position + (steps + len(said))[:, None]
            for blocker, part in blocked:
                blocker.place(self.numbers[rows[part].cpu()], (steps[part] + len(said) - 1).cpu()[:, None])
            inputs = {"input_ids": said[-1][:, None], "attention_mask": mask, "position_ids": at}
            found = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            said.append(found.logits[:, -1].argmax(dim=-1).where(~ended, self._pad))

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep what enters every layer and what its attention puts out."""
        handles = []

        def note_layer(module, args, kwargs, output, index):
            self._entered[index].append(args[0] if args else kwargs["hidden_states"])
            self._outputs[module] = output

        def note_attention(module, args, output, index):
            self._attended[index].append(output_tensor(output))
            self._outputs[module] = output

        for index, layer in enumerate(self.layers):
            keep = (lambda *call, index=index: note_layer(*call, index)), True
            handles.append(layer.register_forward_hook(keep[0], with_kwargs=keep[1]))
            if attention := _inner(layer, ATTENTION):
                handles.append(attention.register_forward_hook(lambda *call, index=index: note_attention(*call, index)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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

    @torch.no_grad()
    def _judge_draft(self, blocker: Blocker) -> "_Changed":
        """Where the answers under a block first differ from the undisturbed ones."""
        draft, mask = self.answers, self._inputs["attention_mask"]
        steps = torch.arange(draft.shape[1], device=draft.device)
        ends = torch.isin(draft, self._ends).int()
        said = ends.cumsum(dim=1) - ends == 0  # up to and with the end
        # The last token of the answers was read by no forward.
        shown = torch.cat([mask, said[:, :-1].to(mask)], dim=1)
        last = self._positions[..., -1:]
        place = torch.cat([self._positions, last + 1 + steps[:-1]], dim=-1)
        blocker.place(self.numbers, torch.arange(-self._length, len(steps) - 1).expand(len(mask), -1))
        ids = torch.cat([self._inputs["input_ids"], draft[:, :-1]], dim=1)
        inputs = {"input_ids": ids, "attention_mask": shown, "position_ids": place}
        with self._replayed(blocker), rewritten(self.model, blocker.site, blocker.rewrite):
            found = self.model(**inputs, use_cache=True, logits_to_keep=len(steps))
        best = found.logits.argmax(dim=-1)
        differs = (best != draft) & said
        rows = differs.any(dim=1).nonzero()[:, 0]
        at = differs[rows].int().argmax(dim=1)
        cache = found.past_key_values
        cache.batch_select_indices(rows)
        kept = torch.cat([mask[rows], (steps[:-1] < at[:, None]).to(mask)], dim=1)
        return _Changed(blocker, found.logits[:, 0], rows, at, best[rows, at], kept, cache)

    @torch.no_grad()
    def _finish(self, waiting: Sequence["_Changed"]) -> Iterator[tuple[Blocker, torch.Tensor, torch.Tensor]]:
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
            with ExitStack() as stack:
                for blocker, part in blocked:
                    stack.enter_context(rewritten(self.model, blocker.site, _of_rows(blocker, part)))
                new = self._continue(token, at, mask, cache, self._positions[..., rows, -1:], blocked, rows)
        for one, part in parts:
            yield one.blocker, self._changed(one, new[part]) if len(one.rows) else self.answers, one.first

    def _changed(self, one: "_Changed", new: torch.Tensor) -> torch.Tensor:
        """The undisturbed answers, in some rows with other tokens from some place on."""
        whole = self.answers.new_full((len(self.answers), self._tokens + new.shape[1]), self._pad)
        whole[:, : self.answers.shape[1]] = self.answers
        places = torch.arange(whole.shape[1], device=whole.device)
        for row, begin, tokens in zip(one.rows.tolist(), one.at.tolist(), new, strict=True):
            whole[row, places >= begin] = self._pad
            whole[row, begin : begin + len(tokens)] = tokens
        return whole[:, : self._tokens]

    @contextmanager
    def _replayed(self, blocker: Blocker) -> Iterator[None]:
        """While entered, a forward of prompt and undisturbed answer computes only what the block changes."""
        site, layer = blocker.site, self.layers[blocker.site.layer]
        changed: dict[nn.Module, Callable] = {}
        for index in range(site.layer):
            changed[self.layers[index]] = self._passed(index)
        if site.component == "residual":
            changed[layer] = self._passed(site.layer)
        elif attention := _inner(layer, ATTENTION):
            changed[attention] = self._attention(site, attention)
        last = self.layers[-1]
        if (ffn := _inner(last, FFN)) and site != Site(len(self.layers) - 1, "residual"):
            changed[ffn] = self._trimmed(ffn)
        with ExitStack() as stack:
            stack.callback(layer.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            for module, forward in changed.items():
                stack.enter_context(_forward(module, forward))
            yield

    def _update(self, index: int, kwargs: Mapping[str, Any]) -> None:
        # Put there rather than added, which would copy them; nothing writes into them.
        kept, length, new = (
            self._cache.layers[index],
            self._entered[0].shape[1],
            kwargs["past_key_values"].layers[index],
        )
        keys, values = kept.keys[..., :length, :], kept.values[..., :length, :]
        new.lazy_initialization(keys, values)
        new.keys, new.values = keys, values

    def _passed(self, index: int):
        """A layer below the block, whose output nothing reads, or one that is blocked as a whole."""

        def forward(hidden_states, *args, **kwargs):
            self._update(index, kwargs)
            return replace_output(self._outputs[self.layers[index]], hidden_states)

        return forward

    def _enter(self, module, args, kwargs):
        """A forward pre-hook: let what entered this layer in the undisturbed run enter it."""
        entered = self._entered[[*self.layers].index(module)]
        return ((entered, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entered})

    def _attention(self, site: Site, attention: nn.Module):
        """The attention of the block's layer: as it was, or, where it is what is blocked, nothing."""
        known = self._attended[site.layer]

        def forward(*args, **kwargs):
            self._update(site.layer, kwargs)
            blocked = site.component == "attention"
            return replace_output(self._outputs[attention], torch.zeros_like(known) if blocked else known)

        return forward

    def _trimmed(self, ffn: nn.Module):
        """The last FFN, at the tokens alone whose logits are asked for; elsewhere 0, which nothing reads."""
        run, before = ffn.forward, self._length - 1

        def forward(hidden_states, *args, **kwargs):
            if hidden_states.ndim != 3 or hidden_states.shape[1] <= before:
                return run(hidden_states, *args, **kwargs)
            found = run(hidden_states[:, before:], *args, **kwargs)
            whole = nn.functional.pad(output_tensor(found), (0, 0, before, 0))
            return replace_output(found, whole)

        return forward


def _of_rows(blocker: Blocker, rows: slice):
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


def _end_tokens(model: nn.Module) -> tuple[torch.Tensor, int]:
    """The ids that end an answer, and the one that pads it.

    Raises:
        NotReplayable: `generate` would do more than take the likeliest token.
    """
    config = model.generation_config
    more = {name: getattr(config, name, None) for name in PLAIN if getattr(config, name, None) not in PLAIN[name]}
    more |= {name: getattr(config, name) for name in UNUSED.split() if getattr(config, name, None)}
    if more:
        raise NotReplayable(f"its generation config asks for {more}.")
    ends = config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    pad = config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0]
    return torch.tensor(ends, dtype=torch.int64, device=model.device), pad


def _inner(layer: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    found = (getattr(layer, name, None) for name in names)
    return next((module for module in found if isinstance(module, nn.Module)), None)


@contextmanager
def _forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let `forward` stand in for that of `module`, whatever stood in for it before."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
