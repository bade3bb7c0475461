"""Change what places in a decoder put out, for a while: the interventions that diagnosis is made of."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .sites import Site, decoder_layers, output_tensor, replace_output, site_module

# Takes what a site puts out and the residual stream as it enters the layer, both (B, S, d), and returns another output.
Rewrite = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def rewritten(model: nn.Module, site: Site, rewrite: Rewrite) -> Iterator[None]:
    """While entered, `site` puts out what `rewrite` makes of its output, in every forward.

    Several may be entered at once; those of one site are applied in the order in which they were entered.

    Raises:
        ValueError: the model has no such site.
    """
    stream: list[torch.Tensor] = []

    def note_stream(module, args, kwargs):
        stream[:] = [args[0] if args else kwargs["hidden_states"]]

    def change_output(module, args, output):
        h = output_tensor(output)
        # Some FFNs work on (B * S, d).
        changed = rewrite(h.reshape(stream[0].shape), stream[0])
        return replace_output(output, changed.to(h.dtype).reshape(h.shape))

    module = site_module(model, site)
    handles = [
        decoder_layers(model)[site.layer].register_forward_pre_hook(note_stream, with_kwargs=True),
        module.register_forward_hook(change_output),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def contribution(site: Site, output: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """What `site` adds to the residual stream: its output, or, of a whole layer, its output less what entered it."""
    return output - stream if site.component == "residual" else output


def with_contribution(site: Site, value: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """The output by which `site` adds `value` (broadcast to (B, S, d)) to the residual stream; see `contribution`."""
    added = value.to(stream).expand(stream.shape)
    return stream + added if site.component == "residual" else added


@contextmanager
def layer_calls(model: nn.Module) -> Iterator[list[tuple[torch.Tensor, Any]]]:
    """Read what enters every decoder layer, (B, S, d), and what it puts out; holds the last forward's after each."""
    calls: list[tuple[torch.Tensor, Any]] = []
    layers = decoder_layers(model)

    def note(module, args, kwargs, output):
        if module is layers[0]:
            calls.clear()
        calls.append((args[0] if args else kwargs["hidden_states"], output))

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def entered_at(model: nn.Module, layer: int, calls: list[tuple[torch.Tensor, Any]]) -> Iterator[None]:
    """While entered, a forward computes nothing below `layer`, and enters it with what entered it in `calls`.

    For the same inputs, without a cache, and in models whose layers hand on nothing but the residual stream.

    Raises:
        ValueError: there is no such layer, or `calls` holds no whole forward.
    """
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer={layer}: the model has {len(layers)} decoder layers (0 to {len(layers) - 1}).")
    if len(calls) != len(layers):
        raise ValueError(f"`calls` holds {len(calls)} of {len(layers)} layers; do a forward in `layer_calls` first.")

    def enter(module, args, kwargs):
        entered = calls[layer][0]
        return ((entered, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entered})

    def passing(index: int):
        return lambda hidden_states, *args, **kwargs: replace_output(calls[index][1], hidden_states)

    with ExitStack() as stack:
        stack.callback(layers[layer].register_forward_pre_hook(enter, with_kwargs=True).remove)
        for index in range(layer):
            stack.enter_context(forward_replaced(layers[index], passing(index)))
        yield


@contextmanager
def ended_after(model: nn.Module, layer: int) -> Iterator[None]:
    """While entered, a forward computes nothing above `layer` but the decoder's last norm, of what `layer` puts out.

    Nothing is raised to end it, so that whatever brings weights and takes them away (accelerate's hooks, FSDP) sees a
    whole forward; weights of the layers above are not even brought. What they would keep in a cache is missing there.

    Raises:
        ValueError: there is no such layer.
    """
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer={layer}: the model has {len(layers)} decoder layers (0 to {len(layers) - 1}).")
    last: list[Any] = []

    def note(module, args, output):
        last[:] = [output]

    def passing(hidden_states, *args, **kwargs):
        return replace_output(last[0], hidden_states)

    with ExitStack() as stack:
        stack.callback(last.clear)
        stack.callback(layers[layer].register_forward_hook(note).remove)
        for above in layers[layer + 1 :]:
            stack.enter_context(forward_replaced(above, passing))
        yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let `forward` stand in for that of `module`, whatever stood in for it before; hooks go on working."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every submodule is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
