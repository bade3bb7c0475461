"""Whether places put out what is added to the residual stream: held against a forward, for names prove nothing."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .interventions import evaluating, layer_calls
from .reading import read
from .sites import Site, output_tensor

ROUNDING = 32  # in units of the dtype's rounding of the stream: what a layer's few additions may differ by


@torch.no_grad()
def check_contributions(model: nn.Module, sites: Sequence[Site], inputs: Mapping[str, torch.Tensor]) -> None:
    """Assert that in every layer of `sites` attention and FFN put out, together, what the layer adds to the stream.

    Sites of whole layers need no such check, and make no forward.

    Args:
        model: whose decoder has the sites.
        sites: FFNs and attentions to check.
        inputs: of any prompt.

    Raises:
        ValueError: a layer adds something else, for example its FFN's output times a factor.
    """
    layers = sorted({site.layer for site in sites if site.component != "residual"})
    if not layers:
        return
    parts = [Site(layer, component) for layer in layers for component in ("attention", "ffn")]
    with evaluating(model), layer_calls(model) as calls:
        activations = read(model, parts, inputs)
    for layer in layers:
        entered, left = calls[layer][0], output_tensor(calls[layer][1])
        of_parts = entered + sum(activations[Site(layer, component)] for component in ("attention", "ffn"))
        error = torch.linalg.vector_norm((left - of_parts).float())
        rounding = ROUNDING * torch.finfo(left.dtype).eps * torch.linalg.vector_norm(left.float())
        if error > rounding:
            raise ValueError(
                f"Layer {layer} of {type(model).__name__} does not add the outputs of its attention and FFN to the "
                f"residual stream as they are (they differ by {error:.2g}, of which {rounding:.2g} could be "
                "rounding), so a repair there would be of something else. Use the component 'residual', or name what "
                "is added: care_hf.name_places(model, layers=..., ffn=..., attention=...)."
            )
