"""Name, find and read places in a model: the outputs that are added to the residual stream of its decoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

COMPONENTS = ("ffn", "attention", "residual")
PLACES = "decoder_places"  # where a configuration keeps what `name_places` was told

# The first of these that a layer has is what it adds to the residual stream, so a norm after the block comes first.
FFN_NAMES = ("post_feedforward_layernorm", "post_mlp_layernorm", "mlp", "feed_forward", "block_sparse_moe", "fc2")
ATTENTION_NAMES = ("post_self_attn_layernorm", "self_attn", "self_attention", "attention")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the decoder, written "16.ffn": what `component` of `layer` (from 0) adds to the residual stream.

    Components are "ffn", "attention" and "residual" (the whole layer's output, that is the stream after it).

    Raises:
        ValueError: a negative layer or an unknown component.
    """

    layer: int
    component: str

    def __post_init__(self):
        if not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"layer={self.layer!r} must be a decoder layer counted from 0.")
        if self.component not in COMPONENTS:
            raise ValueError(f"component={self.component!r} is not known; choose one of {COMPONENTS}.")

    def __str__(self) -> str:
        return f"{self.layer}.{self.component}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read "16.ffn".

        Raises:
            ValueError: the text is of another form.
        """
        layer, _, component = text.partition(".")
        if not (layer.isascii() and layer.isdigit()):
            raise ValueError(f"{text!r} is not a site; write a layer and a component, for example '16.ffn'.")
        return cls(int(layer), component)


def runs_before(first: Site, second: Site) -> bool:
    """Whether `first` puts its output out no later than `second`."""
    order = ("attention", "ffn", "residual")
    return (first.layer, order.index(first.component)) <= (second.layer, order.index(second.component))


def name_places(model: nn.Module, layers: str, ffn: str | None = None, attention: str | None = None) -> None:
    """Say by hand where a model keeps its decoder, if it cannot be told; kept in its configuration and so when saved.

    Args:
        model: any model of transformers.
        layers: where the list of decoder layers is, as a path from the model: "transformer.blocks".
        ffn: what, as a path from a layer, puts out what the FFN adds to the residual stream: "ff.norm".
        attention: the same of attention.

    Raises:
        ValueError: there is nothing of that name.
    """
    found = _submodule(model, layers)
    if not isinstance(found, nn.ModuleList) or not len(found):
        raise ValueError(f"layers={layers!r} is no list of modules of {type(model).__name__}; {_children(model)}.")
    for name, path in (("ffn", ffn), ("attention", attention)):
        missing = [index for index, layer in enumerate(found) if path and _submodule(layer, path) is None]
        if missing:
            raise ValueError(
                f"{name}={path!r} is no module of decoder layers {missing}; {_children(found[missing[0]])}."
            )
    setattr(model.config, PLACES, {"layers": layers, "ffn": ffn, "attention": attention})


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module if isinstance(module, nn.Module) else None


def _children(module: nn.Module) -> str:
    return f"it has {', '.join(name for name, _ in module.named_children())}"


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of the text decoder, never those of the vision tower.

    Raises:
        ValueError: they cannot be told.
    """
    model = getattr(model, "vlm", model)  # paths begin at the base
    named = getattr(model.config, PLACES, None)
    if named:
        return _submodule(model, named["layers"])
    decoder, depth = model.get_decoder(), getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    outermost = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1 or model.config.is_encoder_decoder:
        raise ValueError(
            f"The decoder of {type(model).__name__} cannot be told: looked for one list of {depth} layers "
            f"(`num_hidden_layers` of the text configuration) in {type(decoder).__name__} (`get_decoder()`), and found "
            f"{sorted(lists) or 'none'}. If its text part is decoder-only, say where it is: "
            "care_hf.name_places(model, layers='path.to.layers')."
        )
    return outermost[0]


def site_module(model: nn.Module, site: Site) -> nn.Module:
    """The module whose output is what `site` means.

    Raises:
        ValueError: the model has no such layer or component, or gates the component's output before adding it.
    """
    layers = decoder_layers(model)
    check_depth(site, len(layers))
    layer = layers[site.layer]
    if site.component == "residual":
        return layer
    if hasattr(layer, "cross_attn_mlp_gate"):
        raise ValueError(
            f"Site {site}: layer {site.layer} is a gated cross-attention layer; use the component 'residual'."
        )
    named = (getattr(model.config, PLACES, None) or {}).get(site.component)
    names = (named,) if named else _ffn_names(layer) if site.component == "ffn" else _attention_names(layer)
    module = next((found for name in names if (found := _submodule(layer, name)) is not None), None)
    if module is None:
        raise ValueError(
            f"Site {site}: looked for {names} in {type(layer).__name__}, and {_children(layer)}. Use the component "
            f"'residual', or say which puts out what is added to the residual stream: "
            f"care_hf.name_places(model, layers=..., {site.component}='name')."
        )
    return module


def check_depth(site: Site, depth: int) -> None:
    """Assert that a model of so many decoder layers has the layer of `site`.

    Raises:
        ValueError: it has not.
    """
    if site.layer >= depth:
        raise ValueError(f"Site {site}: the model has {depth} decoder layers (0 to {depth - 1}).")


def _ffn_names(layer: nn.Module) -> tuple[str, ...]:
    return ("post_attention_layernorm",) if _norms_outputs(layer) else FFN_NAMES


def _attention_names(layer: nn.Module) -> tuple[str, ...]:
    if _norms_outputs(layer):
        return ("input_layernorm",)
    # In most families `post_attention_layernorm` is the norm before the FFN; in those with a norm of what the FFN adds
    # it is the norm of what attention adds.
    sandwich = hasattr(layer, "post_feedforward_layernorm")
    return ("post_attention_layernorm", *ATTENTION_NAMES) if sandwich else ATTENTION_NAMES


def _norms_outputs(layer: nn.Module) -> bool:
    """Whether norms that are named for inputs norm what is added, as in Chameleon-30B."""
    return "SwinDecoderLayer" in type(layer).__name__


def hidden_size(model: nn.Module) -> int:
    """Width d of the decoder's residual stream."""
    return model.config.get_text_config().hidden_size


def image_token_ids(config: Any) -> tuple[int, ...]:
    """The ids of image and video placeholders that the configuration names; empty if the model has none in its text."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = [getattr(config, name, None) for name in names]
    ids.append((getattr(config, "vocabulary_map", None) or {}).get("<image>"))  # Chameleon's
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))


def visual_token_ids(config: Any) -> tuple[int, ...]:
    """The ids of tokens in whose place images and videos are.

    None in Mllama: its images are not in the sequence, and what stands for one there is a token of the text.
    """
    by_cross_attention = getattr(config.get_text_config(), "cross_attention_layers", None)
    return () if by_cross_attention else image_token_ids(config)


def output_tensor(output: Any) -> torch.Tensor:
    """The activations in a module's output: itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def replace_output(output: Any, tensor: torch.Tensor) -> Any:
    """The same output with other activations."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


@contextmanager
def record(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, torch.Tensor]]:
    """Read activations: yields a dict that holds, after each forward, what every site put out, (B, S, d).

    At a repaired site that is the output after the repair. Tensors are the model's own, neither copied nor detached.

    Raises:
        ValueError: the model has no such site.
    """
    activations: dict[Site, torch.Tensor] = {}
    shapes: dict[int, torch.Size] = {}
    layers = decoder_layers(model)

    def note_shape(index):
        def hook(module, args, kwargs):
            shapes[index] = (args[0] if args else kwargs["hidden_states"]).shape

        return hook

    def note_output(site):
        def hook(module, args, output):
            # Some FFNs work on (B * S, d).
            activations[site] = output_tensor(output).reshape(shapes[site.layer])

        return hook

    handles = []
    try:
        for index in sorted({site.layer for site in sites}):
            if index < len(layers):
                handles.append(layers[index].register_forward_pre_hook(note_shape(index), with_kwargs=True))
        for site in sites:
            handles.append(site_module(model, site).register_forward_hook(note_output(site)))
        yield activations
    finally:
        for handle in handles:
            handle.remove()
