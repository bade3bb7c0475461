"""What the repaired modules of a model share while it runs: the switch, the visual tokens, and the gate's decisions.

What a gate decided is kept in the key-value cache itself, as one more layer of it, which holds a flag and the id of
every token. So it is reordered by beam search, cropped by assisted decoding and carried along by chunked prefill as the
keys are.
"""

import inspect
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .gating import prompt_ends, turn_steps
from .sites import image_token_ids

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # before transformers 5.23
    DummyLayer = None


class RepairState:
    """The switch, the end of prompts, and what is known of the forward that runs.

    Attributes:
        enabled: whether modules repair; no file keeps it.
        prompt_end: the ids that end a prompt; empty unless there is a gate.
    """

    def __init__(self):
        self.enabled = True
        self.prompt_end: tuple[int, ...] = ()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._by_thread, self._traced = threading.local(), Forward()

    @property
    def now(self) -> "Forward":
        """The forward of this thread, so that answers given at the same time do not mix."""
        if torch.compiler.is_compiling():
            return self._traced  # dynamo does not follow thread locals; in its graph this is a value like any other
        if not hasattr(self._by_thread, "forward"):
            self._by_thread.forward = Forward()
        return self._by_thread.forward

    @property
    def visual_mask(self) -> torch.Tensor | None:
        """That of the forward of this thread."""
        return self.now.visual_mask

    def __getstate__(self):
        return {"enabled": self.enabled, "prompt_end": self.prompt_end}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin_anew()


class Forward:
    """What the modules know while a forward lasts.

    Attributes:
        visual_mask: bool (B, S), True at image and video tokens; None unless a fusion needs it.
        pictured: bool (B, S), whether there is an image up to a token; None unless there is a gate.
        steps: int64 (B, S), as `gating.turn_steps` counts them; None unless there is a gate.
        held_steps: the same, but -1 wherever the gate did not fire.
    """

    def __init__(self):
        self.visual_mask = None
        self._clear()

    def _clear(self) -> None:
        self.pictured = self.steps = self.held_steps = None
        self._ids = self._entry = self._cache = self._layer = None
        self._prompt_end: tuple[int, ...] = ()

    def begin(self, vlm: nn.Module, args: tuple, kwargs: dict[str, Any], prompt_end: tuple[int, ...]) -> None:
        """Take what a forward was called with: its tokens and its cache."""
        self._clear()
        self._prompt_end = prompt_end
        given = {**(inspect.signature(vlm.forward).bind_partial(*args).arguments if args else {}), **kwargs}
        if given.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "Several sequences are packed into one, so the gate cannot tell where one ends; pad them instead, and "
                "use `generate`, not `generate_batch` or cache_implementation='paged'."
            )
        self._ids = given.get("input_ids")
        images = image_token_ids(vlm.config)
        if self._ids is None:
            self._ids = _ids_of_embeddings(vlm, given["inputs_embeds"], {*prompt_end, *images})
        cache = given.get("past_key_values")
        # Its name since transformers 5.24.
        self._cache = _decoder_cache(given.get("cache") if cache is None else cache)
        self._layer = _turn_layer(self._cache)
        self._check_history()
        self.pictured = _among(self._ids, images).cummax(dim=1).values
        if self._layer is not None and self._layer.is_initialized:  # not so after a reset
            history = self._layer.keys[:, 0, :, 0].to(self._ids.device)
            self.pictured = self.pictured | _among(history, images).any(dim=1, keepdim=True)

    def _check_history(self) -> None:
        """Assert that the gate has seen every token in the cache."""
        past = 0 if self._cache is None else self._cache.get_seq_length()
        known = 0 if self._layer is None else self._layer.get_seq_length()
        message = (
            "The cache holds tokens that the gate has not seen, so it cannot tell where the prompt ended; start again "
            "with an empty cache (the repair was off, or another model filled it)."
        )
        if torch.compiler.is_compiling() and not (isinstance(past, int) and isinstance(known, int)):
            # A static cache counts in tensors, which compiled code must not look into.
            torch._assert_async(torch.as_tensor(past == known), message)
        elif int(past) != int(known):
            raise ValueError(message)

    def decide(self, fires: torch.Tensor) -> None:
        """Hear of the gate where it would fire, bool (B, S), and count the steps of every token."""
        ids = self._ids.to(fires.device)
        # Layers keep one dtype, that of the ids.
        self._entry = ids[:, None, :, None], fires[:, None, :, None].to(ids.dtype)
        if self._layer is None:
            steps, held = turn_steps(prompt_ends(ids, self._prompt_end), fires)
        else:
            past = self._layer.get_seq_length()
            if isinstance(past, torch.Tensor):
                past = past.clone()  # counted up in place by the update
            columns = past + torch.arange(ids.shape[1], device=ids.device)
            ids, fires = (history[:, 0, :, 0].to(ids.device) for history in self._layer.update(*self._entry))
            every = turn_steps(prompt_ends(ids, self._prompt_end), fires.bool())
            steps, held = (of_all.index_select(1, columns) for of_all in every)
        self.steps, self.held_steps = steps, torch.where(held, steps, -1)

    def end(self, output: Any) -> None:
        """Keep the decisions in the cache that the forward returns, if it does, and forget the rest."""
        if self._entry is not None and self._layer is None:
            cache = self._cache if self._cache is not None else _returned_cache(output)
            if cache is not None:
                layer = _new_turn_layer(cache)
                layer.update(*self._entry)
                cache.layers.append(layer)
        self._clear()


def watch_turns(vlm: nn.Module, state: RepairState) -> None:
    """Have every forward of `vlm` begin and end with `state`."""
    vlm.care_state = state
    vlm.register_forward_pre_hook(_begin, with_kwargs=True)
    vlm.register_forward_hook(_end)


def watch_visual_tokens(vlm: nn.Module, state: RepairState) -> None:
    """Have every forward of `vlm` note in `state` which of its tokens are visual."""
    vlm.care_state = state
    vlm.register_forward_pre_hook(_note_visual_tokens, with_kwargs=True)
    vlm.register_forward_hook(_forget_visual_tokens, always_call=True)


# Hooks are functions of this module that find the state on the model, so that deepcopy and pickle work.


def _begin(vlm: nn.Module, args, kwargs) -> None:
    if vlm.care_state.enabled:
        vlm.care_state.now.begin(vlm, args, kwargs, vlm.care_state.prompt_end)


def _end(vlm: nn.Module, args, output) -> None:
    if vlm.care_state.enabled:
        vlm.care_state.now.end(output)


def _note_visual_tokens(vlm: nn.Module, args, kwargs) -> None:
    """Find the image and video tokens as the base itself does: by id, or by the placeholder's embedding."""
    ids, tokens = kwargs.get("input_ids", args[0] if args else None), image_token_ids(vlm.config)
    if ids is None:
        ids = _ids_of_embeddings(vlm, kwargs["inputs_embeds"], tokens)
    vlm.care_state.now.visual_mask = _among(ids, tokens)


def _forget_visual_tokens(vlm: nn.Module, args, output) -> None:
    vlm.care_state.now.visual_mask = None


def _among(ids: torch.Tensor, tokens: Iterable[int]) -> torch.Tensor:
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        found = found | (ids == token)
    return found


def _ids_of_embeddings(vlm: nn.Module, embeddings: torch.Tensor, tokens: Iterable[int]) -> torch.Tensor:
    """The ids of some tokens, found by their embeddings as the base finds its placeholders; -1 for all others."""
    ids, embed = torch.full(embeddings.shape[:2], -1, device=embeddings.device), vlm.get_input_embeddings()
    for token in tokens:
        placeholder = embed(torch.tensor(token, device=embeddings.device))
        ids = torch.where((embeddings == placeholder).all(-1), token, ids)
    return ids


class _GrowingTurns(DynamicLayer, DummyLayer or object):
    """Flags and ids of tokens in place of keys and values.

    A dummy to the cache, which therefore neither takes its attention mask from here nor counts on it when it offloads
    layers in turn.
    """

    _layer_type = None  # else some versions would make every cache of such layers
    supports_early_init = False
    holds_turns = True


class _PreallocatedTurns(StaticLayer, DummyLayer or object):
    """The same, for a cache of fixed length."""

    _layer_type = None
    supports_early_init = False
    holds_turns = True


def _decoder_cache(cache: Any) -> Cache | None:
    return getattr(cache, "self_attention_cache", cache)


def _returned_cache(output: Any) -> Cache | None:
    values = output.values() if isinstance(output, dict) else output
    return next((_decoder_cache(value) for value in values if isinstance(value, Cache)), None)


def _turn_layer(cache: Cache | None):
    # By name, not by class: the code of a checkpoint has classes of its own.
    layers = [] if cache is None else cache.layers
    return next((layer for layer in layers if getattr(layer, "holds_turns", False)), None)


def _new_turn_layer(cache: Cache):
    """Preallocated if there are layers of the cache that are and hold every token, else growing."""
    if DummyLayer is None and getattr(cache, "offloading", False):
        raise ValueError("With a gate, an offloaded cache needs transformers 5.23 or later; use another cache.")
    lengths = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer) and not layer.is_sliding]
    return _PreallocatedTurns(max(lengths)) if lengths else _GrowingTurns()
