"""What the repaired modules of a model share while it runs: the switch, the visual tokens, and the gate's decisions.

What a gate decided is kept in the key-value cache itself, as one more layer of it, which holds the id of every token
and what `gating.pack` keeps of it. So it is reordered by beam search, cropped by assisted decoding and carried along by
chunked prefill as the keys are.
"""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .gating import GateReader, among, pack, prompt_ends, turn_steps, unpack
from .projection import branches_freely

try:
    from transformers.cache_utils import DummyLayer
except ImportError:  # before transformers 5.23
    DummyLayer = None


class RepairState:
    """The switch, what the repair needs to be told, and what is known of the forward that runs.

    Attributes:
        enabled: whether modules repair; no file keeps it.
        prompt_end: the ids that end a prompt; empty unless there is a gate.
        image_tokens: the ids that stand for an image.
        routed: those of visual tokens, if they are repaired otherwise than the text; else empty.
    """

    def __init__(self, prompt_end: Sequence[int] = (), image_tokens: Sequence[int] = (), routed: Sequence[int] = ()):
        self.enabled = True
        self.prompt_end, self.image_tokens, self.routed = tuple(prompt_end), tuple(image_tokens), tuple(routed)
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

    @now.setter
    def now(self, forward: "Forward") -> None:
        if torch.compiler.is_compiling():
            self._traced = forward
        else:
            self._by_thread.forward = forward

    @contextmanager
    def answering(self, ids: torch.Tensor | None) -> Iterator[None]:
        """While entered, prompts that are given as embeddings alone are those of `ids` (B, S)."""
        before = self._prompts
        self._by_thread.prompts = ids
        try:
            yield
        finally:
            self._by_thread.prompts = before

    @property
    def _prompts(self) -> torch.Tensor | None:
        return None if torch.compiler.is_compiling() else getattr(self._by_thread, "prompts", None)

    def ids_of(self, model: PreTrainedModel, embeddings: torch.Tensor) -> torch.Tensor:
        """The ids (B, S) of the tokens that matter in embeddings (B, S, d), -1 for others; see `answering`.

        Raises:
            ValueError: images cannot be told in what a language model was given alone.
        """
        ids, (rows, length) = self._prompts, embeddings.shape[:2]
        if ids is not None and ids.shape[1] == length and rows % len(ids) == 0:
            return ids.repeat_interleave(rows // len(ids), dim=0)  # beams lie side by side
        if not model.care_whole:
            raise ValueError(
                f"The {type(model).__name__} inside was given embeddings alone, in which images cannot be told; "
                "call `generate` of the repaired model with its input_ids."
            )
        return _ids_of_embeddings(model, embeddings, {*self.prompt_end, *self.image_tokens})

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin_anew()


class Forward:
    """What the modules know while a forward lasts, and while gradient checkpointing runs parts of it again.

    Attributes:
        model: what was called; None if no forward is going on.
        visual_mask: bool (B, S), True at image and video tokens; None unless a fusion needs it.
        pictured: bool (B, S), whether there is an image up to a token; None unless there is a gate.
        steps: int64 (B, S), as `gating.turn_steps` counts them; None unless there is a gate.
        held_steps: the same, but -1 wherever the gate did not fire.
    """

    def __init__(self, model: PreTrainedModel | None = None, prompt_end: tuple[int, ...] = ()):
        self.model = model
        self.visual_mask = self.pictured = self.steps = self.held_steps = None
        self._prompt_end = prompt_end
        self._ids = self._ends = self._before = self._entry = self._cache = self._layer = None
        self._goes_on = False

    @classmethod
    def of_call(cls, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], state: RepairState) -> "Forward":
        """What is known of a call of `model`: its tokens and its cache."""
        given = {**(inspect.signature(model.forward).bind_partial(*args).arguments if args else {}), **kwargs}
        forward = cls(model, state.prompt_end)
        forward._ids = given.get("input_ids")
        if forward._ids is None:
            forward._ids = state.ids_of(model, given["inputs_embeds"])
        if state.routed:
            forward.visual_mask = among(forward._ids, state.routed)
        if state.prompt_end:
            forward._begin_turns(given, state.image_tokens)
        return forward

    def _begin_turns(self, given: dict[str, Any], images: tuple[int, ...]) -> None:
        if given.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "Several sequences are packed into one, so the gate cannot tell where one ends; pad them instead, and "
                "use `generate`, not `generate_batch` or cache_implementation='paged'."
            )
        cache = given.get("past_key_values")
        # Its name since transformers 5.24.
        self._cache = _decoder_cache(given.get("cache") if cache is None else cache)
        self._layer = _turn_layer(self._cache)
        self._check_history()
        self.pictured = among(self._ids, images)
        if self._ids.shape[1] > 1:
            self.pictured = self.pictured.cummax(dim=1).values
        if self._layer is None or not self._layer.is_initialized:  # not so after a reset
            self._ends = prompt_ends(self._ids, self._prompt_end)
            return
        earlier, packed = _recent(self._layer, len(self._prompt_end) - 1, self._ids.device)
        self._ends = prompt_ends(self._ids, self._prompt_end, earlier)
        # One token more of an answer: most forwards by far.
        self._goes_on = self._ids.shape[1] == 1 and branches_freely(self._ids) and not self._ends.any()
        *self._before, pictured = unpack(packed)
        self.pictured = self.pictured | pictured

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

    def decide(self, gate: GateReader, h: torch.Tensor) -> None:
        """Have the gate read h (B, S, d) where prompts end, and count the steps of every token."""
        if self.steps is not None:
            return  # gradient checkpointing asks again
        ends, pictured = self._ends.to(h.device), self.pictured.to(h.device)
        before = None if self._before is None else tuple(of_token.to(h.device) for of_token in self._before)
        fires = None if self._goes_on else gate(h, pictured, ends)
        steps, held = turn_steps(ends, fires, before)
        ids, packed = self._ids.to(h.device), pack(steps, held, pictured)
        self._entry = ids[:, None, :, None], packed[:, None, :, None].to(ids.dtype)  # layers keep one dtype
        if self._layer is not None:
            self._layer.update(*self._entry)
        self.steps, self.held_steps = steps, torch.where(held, steps, -1)

    def end(self, output: Any) -> None:
        """Keep the decisions in the cache that the forward returns, if it does."""
        if self._entry is not None and self._layer is None:
            cache = self._cache if self._cache is not None else _returned_cache(output)
            if cache is not None:
                layer = _new_turn_layer(cache)
                layer.update(*self._entry)
                cache.layers.append(layer)


class RecallingCheckpoint:
    """A function of gradient checkpointing that has the parts it runs again know what they knew the first time.

    Args:
        state: of the model.
        checkpoint: the function, called as ``checkpoint(run, *args)``.
    """

    def __init__(self, state: RepairState, checkpoint: Callable):
        self.state, self.checkpoint = state, checkpoint

    def __call__(self, run: Callable, *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `run`."""
        forward, enabled = self.state.now, self.state.enabled

        def recalling(*args, **kwargs):
            before = self.state.now, self.state.enabled
            self.state.now, self.state.enabled = forward, enabled
            try:
                return run(*args, **kwargs)
            finally:
                self.state.now, self.state.enabled = before

        return self.checkpoint(recalling, *args, **kwargs)


def watch_forwards(vlm: PreTrainedModel, state: RepairState) -> None:
    """Have every forward of `vlm` begin and end with `state`, if the repair needs to be told anything.

    So does every forward of a language model in it that may answer alone: InstructBLIP hands it embeddings to generate
    from.
    """
    if not state.prompt_end and not state.routed:
        return
    answering = getattr(vlm, "language_model", None)
    for model in (vlm, answering) if isinstance(answering, GenerationMixin) else (vlm,):
        model.care_state, model.care_whole = state, model is vlm
        model.register_forward_pre_hook(_begin, with_kwargs=True)
        model.register_forward_hook(_end, always_call=True)


# Hooks are functions of this module that find the state on the model, so that deepcopy and pickle work.


def _begin(model: PreTrainedModel, args, kwargs) -> None:
    state = model.care_state
    if state.enabled and state.now.model is None:
        # A new one each time: gradient checkpointing holds on to what the modules knew.
        state.now = Forward.of_call(model, args, kwargs, state)


def _end(model: PreTrainedModel, args, output) -> None:
    state = model.care_state
    if state.now.model is model:
        if output is not None:  # there is none if the forward failed
            state.now.end(output)
        state.now = Forward()


def _recent(layer: Any, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids (B, count) of the last tokens in a layer, -1 where there are none; what is packed (B, 1) of the last."""
    past, ids, packed = layer.get_seq_length(), layer.keys[:, 0, :, 0], layer.values[:, 0, :, 0]
    if isinstance(layer, StaticLayer):
        places = past - count + torch.arange(count, device=ids.device)
        ids = torch.where(places >= 0, ids.index_select(1, places.clamp(min=0)), -1)
        # Where there is none yet, it is 0, as it should be.
        packed = packed.index_select(1, torch.as_tensor(past - 1, device=ids.device).clamp(min=0).reshape(1))
    else:
        ids, packed = ids[:, max(past - count, 0) :], packed[:, -1:]
        if past < count:
            ids = pad(ids, (count - past, 0), value=-1)
    return ids.to(device), packed.to(device)


def _ids_of_embeddings(model: PreTrainedModel, embeddings: torch.Tensor, tokens: Iterable[int]) -> torch.Tensor:
    """The ids of some tokens, found by their embeddings as the base finds its placeholders; -1 for all others."""
    ids, embed = torch.full(embeddings.shape[:2], -1, device=embeddings.device), model.get_input_embeddings()
    for token in tokens:
        placeholder = embed(torch.tensor(token, device=embeddings.device))
        ids = torch.where((embeddings == placeholder).all(-1), token, ids)
    return ids


class _GrowingTurns(DynamicLayer, DummyLayer or object):
    """The ids of tokens and what is packed of them in place of keys and values.

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
