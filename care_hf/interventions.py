"""Change what places in a decoder put out, for a while: the interventions that diagnosis is made of."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
