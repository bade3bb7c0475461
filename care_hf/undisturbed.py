"""The undisturbed greedy answers of one batch, with all that a blocked run can take over from them (`replay`)."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .devices import input_device
from .interventions import forward_replaced
from .sites import decoder_layers, output_tensor

ATTENTION = ("self_attn", "self_attention", "attention")
# What `generate` may do to logits beside taking the largest; where none of it is on, a plain loop gives its answers.
PLAIN = {"repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0), "num_beams": (None, 1)}
PLAIN |= {"min_length": (None, 0), "guidance_scale": (None, 1.0), "encoder_repetition_penalty": (None, 1.0)}
UNUSED = """bad_words_ids sequence_bias suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
min_new_tokens exponential_decay_length_penalty watermarking_config penalty_alpha stop_strings"""
# Says what each token of the prompt is; with it, prompts may be read otherwise than answers are.
TOKEN_TYPES = "token_type_ids"


class NotReplayable(ValueError):
    """The model does something that a replay would leave out; generate its answers the plain way."""


class Undisturbed:
    """The greedy answers of one batch without a block, and how they came about.

    Args:
        model: in evaluation mode.
        inputs: left-padded, see `samples.collate`.
        tokens: of an answer, at most.

    Attributes:
        answers: int64 (B, T), padded with `pad` after the end of each.
        first: (B, vocabulary), logits of the first token.
        ids, mask: int64 (B, L), of the prompts.
        positions: of the prompts, (B, L) or (n, B, L), as the decoder takes them.
        cache: keys and values of prompts and answers but for the last token, which no forward read.
        entered: (B, L + T - 1, d), what entered each layer.
        attended: the same, what the attention of each layer returned; None where it has none of a known name.
        outputs: how layers and attention return theirs, alone or in a tuple.

    Raises:
        NotReplayable: the model keeps other state than keys and values of all tokens, or decodes otherwise than
            greedily.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], tokens: int):
        self.model, self.tokens, self.layers = model, tokens, decoder_layers(model)
        _check_calls(model, inputs)
        self.ends, self.pad = _end_tokens(model)
        inputs = {name: value.to(input_device(model)) for name, value in inputs.items()}
        self.ids, self.mask = inputs["input_ids"], inputs["attention_mask"]
        self.outputs: dict[nn.Module, Any] = {}
        entered: list[list[torch.Tensor]] = [[] for _ in self.layers]
        attended: list[list[torch.Tensor]] = [[] for _ in self.layers]
        with self._recorded(entered, attended):
            self.answers, self.first = self._generate(inputs)
        self.entered = [torch.cat(parts, dim=1) for parts in entered]
        self.attended = [torch.cat(parts, dim=1) if parts else None for parts in attended]

    @torch.no_grad()
    def _generate(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Answer the batch, and keep its cache and positions."""
        seen: list[torch.Tensor] = []

        def note(module, args, kwargs):
            if isinstance(kwargs.get("position_ids"), torch.Tensor):
                seen.append(kwargs["position_ids"])

        positions = (self.mask.cumsum(dim=1) - 1).clamp_min(0)
        # The model's own positions, where it makes them from what is in the prompt.
        own = {} if "image_grid_thw" in inputs else {"position_ids": positions}
        handle = self.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        try:
            found = self.model(**inputs, **own, use_cache=True, logits_to_keep=1)
        finally:
            handle.remove()
        self.positions = seen[0] if seen else positions
        if self.positions.shape[-2:] != self.mask.shape:
            raise NotReplayable(f"its positions have the shape {tuple(self.positions.shape)}.")
        self.cache = found.get(cache_keyword(self.model))
        self._check_cache()
        first = found.logits[:, -1]
        steps = torch.zeros(len(self.mask), dtype=torch.int64, device=self.mask.device)
        return self.go_on(first.argmax(dim=-1), steps, self.mask, self.cache, self.positions[..., -1:]), first

    def _check_cache(self) -> None:
        if not isinstance(self.cache, DynamicCache) or {type(c) for c in self.cache.layers} != {DynamicLayer}:
            raise NotReplayable(f"it keeps its state in a {type(self.cache).__name__} of other layers.")
        if len(self.cache.layers) != len(self.layers):
            raise NotReplayable(f"it caches {len(self.cache.layers)} of its {len(self.layers)} layers.")
        lengths = {layer.get_seq_length() for layer in self.cache.layers}
        if lengths != {self.mask.shape[1]}:
            raise NotReplayable(f"it caches {sorted(lengths)} tokens of a prompt of {self.mask.shape[1]}.")

    @torch.no_grad()
    def go_on(
        self,
        token: torch.Tensor,
        steps: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache,
        position: torch.Tensor,
        before: Callable[[torch.Tensor], None] = lambda steps: None,
    ) -> torch.Tensor:
        """Greedy answers of b rows from a token that is known on; tokens of rows that are at their end are padding.

        Args:
            token: int64 (b,), which is token number `steps` (b,) of each row's answer.
            steps: see `token`.
            mask: of the tokens in `cache`.
            cache: is extended.
            position: (b, 1) or (n, b, 1), of the last token of the prompts.
            before: called before every forward with the number (b,) of the token that it reads.
        """
        said, ended = [token], torch.zeros(len(token), dtype=torch.bool, device=token.device)
        while True:
            ended = ended | torch.isin(said[-1], self.ends)
            done = ended | (steps + len(said) >= self.tokens)
            if bool(done.all()):
                return torch.stack(said, dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            before(steps + len(said) - 1)
            at = position + (steps + len(said))[:, None]
            inputs = {"input_ids": said[-1][:, None], "attention_mask": mask, "position_ids": at}
            inputs[cache_keyword(self.model)] = cache
            found = self.model(**inputs, use_cache=True, logits_to_keep=1)
            said.append(found.logits[:, -1].argmax(dim=-1).where(~ended, self.pad))

    @contextmanager
    def _recorded(self, entered: list[list[torch.Tensor]], attended: list[list[torch.Tensor]]) -> Iterator[None]:
        """Keep what enters every layer, and what its attention returns before any hooks, which run again later."""

        def note_layer(index):
            def hook(module, args, kwargs, output):
                entered[index].append(args[0] if args else kwargs["hidden_states"])
                self.outputs[module] = output

            return hook

        def noted(index, attention):
            run = attention.forward

            def forward(*args, **kwargs):
                output = run(*args, **kwargs)
                attended[index].append(output_tensor(output))
                self.outputs[attention] = output
                return output

            return forward

        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.callback(layer.register_forward_hook(note_layer(index), with_kwargs=True).remove)
                if attention := inner(layer, ATTENTION):
                    stack.enter_context(forward_replaced(attention, noted(index, attention)))
            yield


def inner(layer: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first submodule of `layer` that has one of these names."""
    found = (getattr(layer, name, None) for name in names)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def cache_keyword(model: nn.Module) -> str:
    """What `model` calls its cache: "cache" since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _check_calls(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Whether tokens can be read later as they are in the prompt.

    Raises:
        NotReplayable: not so.
    """
    taken = inspect.signature(model.forward).parameters
    missing = {"position_ids", "logits_to_keep"} - set(taken)
    if missing and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        raise NotReplayable(f"its forward takes no {' and no '.join(sorted(missing))}.")
    if TOKEN_TYPES in inputs:
        raise NotReplayable(f"it tells tokens of the prompt apart by {TOKEN_TYPES}.")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise NotReplayable("it is spread over several devices.")


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
    return torch.tensor(ends, dtype=torch.int64, device=input_device(model)), pad
