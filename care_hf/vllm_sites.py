"""Repaired modules in a model of vLLM: of its own classes, or of transformers' inside its Transformers backend."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .gating import TurnProjection, unpack
from .sites import Site, decoder_layers, output_tensor, replace_output, site_module
from .vllm_turns import Turns

PATHS = {"ffn": "mlp", "attention": "self_attn", "residual": ""}  # from a layer of those that are known
KNOWN_LAYERS = {  # they return the stream in two parts, and add to it what `mlp` and `self_attn` put out
    "vllm.model_executor.models.llama.LlamaDecoderLayer",
    "vllm.model_executor.models.qwen2.Qwen2DecoderLayer",
}


class ServedSite:
    """Put before a module's own class, it has the output read by `care_gate` and repaired by `care`, if there are any.

    Attributes:
        care: a `SafetyProjection` or a `TurnProjection`, or None.
        care_gate: a `GateReader`, or None.
        care_turns: a `Turns`, what the repaired modules share.
        care_scope: see `CareConfig`.
        care_forward: what stands in for the forward of the module's class, or None.
        care_halves: whether the output is two tensors of which the stream is the sum, as layers of vLLM's own have it.
    """

    def forward(self, *args, **kwargs):
        """The module's own forward, then the gate, then the repair."""
        own = self.care_forward
        output = super().forward(*args, **kwargs) if own is None else own(*args, **kwargs)
        h = output[0] + output[1] if self.care_halves else output_tensor(output)
        if self.care_gate is not None:
            torch.ops.vllm.care_decide(h.reshape(-1, h.shape[-1]), self.care_turns.packed)
        if self.care is None:
            return output
        repaired = self._repair(h.reshape(-1, h.shape[-1])).reshape(h.shape)
        # The next norm adds the two: nothing to the repaired stream, so that it stays as it is.
        return (repaired, torch.zeros_like(h)) if self.care_halves else replace_output(output, repaired)

    def _repair(self, h: torch.Tensor) -> torch.Tensor:
        count = h.shape[0]
        if isinstance(self.care, TurnProjection):
            steps, held, _ = unpack(self.care_turns.packed[:count])
            return self.care(h, torch.where(held, steps, -1))
        repaired = self.care(h, self.care_turns.visual[:count])
        if self.care_scope == "all":
            return repaired
        steps, _, _ = unpack(self.care_turns.packed[:count])
        return torch.where((steps <= 0)[:, None], repaired, h)


@functools.cache
def served_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with `ServedSite` before it; weight names stay those of `cls`."""
    return type(
        f"Served{cls.__name__}", (ServedSite, cls), {"__module__": __name__, "__doc__": f"A repaired {cls.__name__}."}
    )


@dataclass(frozen=True, eq=False)
class Place:
    """A site's module, its path from its decoder layer, and whether it puts the stream out in two parts."""

    module: nn.Module
    path: str
    halves: bool = False


def known_places(layers: nn.ModuleList, sites: Iterable[Site]) -> dict[Site, Place]:
    """Where sites are in layers of vLLM's own.

    Raises:
        ValueError: there is no such layer, or it is of a class that is not known.
    """
    places = {}
    for site in sites:
        if site.layer >= len(layers):
            raise ValueError(f"Site {site}: the model has {len(layers)} decoder layers (0 to {len(layers) - 1}).")
        layer, path = layers[site.layer], PATHS[site.component]
        name = f"{type(layer).__module__}.{type(layer).__qualname__}"
        if name not in KNOWN_LAYERS:
            raise ValueError(
                f"Site {site}: it is not known what a {name} adds to the residual stream. Serve the checkpoint through "
                'vLLM\'s Transformers backend, with "architectures": ["CareTransformersMultiModalForCausalLM"] in '
                "--hf-overrides (docs/serving.md)."
            )
        places[site] = Place(layer.get_submodule(path), path, halves=not path)
    return places


def backend_places(model: nn.Module, sites: Iterable[Site]) -> dict[Site, Place]:
    """Where sites are in a model of transformers that vLLM has put layers of its own into.

    Raises:
        ValueError: the model has no such site.
    """
    layers, places = decoder_layers(model), {}
    for site in sites:
        module = site_module(model, site)
        path = next(path for path, found in layers[site.layer].named_modules() if found is module)
        places[site] = Place(module, path)
    return places


def swap(place: Place, turns: Turns, scope: str) -> nn.Module:
    """Make the module of `place` a `ServedSite` that does nothing yet."""
    module = place.module
    if not isinstance(module, ServedSite):
        module.__class__ = served_class(type(module))
        module.care = module.care_gate = None
        # vLLM's Transformers backend puts a forward of its own on a module whose linear layers it joins.
        module.care_forward = module.__dict__.pop("forward", None)
    module.care_turns, module.care_scope, module.care_halves = turns, scope, place.halves
    return module


def check_in_place(model: nn.Module, place: Place) -> None:
    """Assert that whatever runs the module of `place` runs its repair.

    Raises:
        ValueError: the module has another forward, or is no part of the model any more.
    """
    module = place.module
    found = getattr(module.forward, "__func__", None)
    if found is not ServedSite.forward or all(other is not module for other in model.modules()):
        raise ValueError(
            f"Something took the place of {type(module).__name__} or of its forward, so that it would run unrepaired; "
            "serve without what changes modules (quantisation, adapters), or with another version of vLLM."
        )
