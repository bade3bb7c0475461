"""Prompts through a model that are only read: no further than to the last place that is asked for."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .devices import input_device
from .interventions import ended_after
from .sites import Site, record


def read(model: nn.Module, sites: Sequence[Site], inputs: Mapping[str, torch.Tensor]) -> dict[Site, torch.Tensor]:
    """What every site puts out, (B, S, d), as in a whole forward; layers above the last of `sites` are not computed.

    Args:
        model: with its head or without; the head is not computed either.
        sites: at least one.
        inputs: what the model takes.

    Raises:
        ValueError: the model has no such site.
    """
    with reading(model, max(site.layer for site in sites)), record(model, sites) as activations:
        # The headless model: logits over the whole prompt would be the largest tensor of all.
        model.base_model(**{name: value.to(input_device(model)) for name, value in inputs.items()}, use_cache=False)
    return activations


@contextmanager
def reading(model: nn.Module, last: int) -> Iterator[None]:
    """While entered, forwards end after the layer `last` and run eagerly, so that hooks see what is compiled, too.

    Raises:
        ValueError: there is no such layer.
    """
    with ExitStack() as stack:
        # A compiled module goes on without the hooks that it was compiled without. Nothing is where this is not loaded.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(ended_after(model, last))
        yield
