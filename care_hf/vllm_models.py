"""Repaired models in vLLM: its own class of the base, or its Transformers backend, with the repair put in.

The classes are made when they are asked for, by name, since each takes a module of vLLM to be loaded.
"""

import functools
import importlib
import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm import ModelRegistry
from vllm.config import VllmConfig

from .sites import Site
from .vllm_repair import Repair
from .vllm_settings import BACKEND, NATIVE, check_engine, repair_config
from .vllm_sites import Place, backend_places, known_places

TOWER = re.compile(r"^(?:model\.)?vision_tower\.(?!vision_model\.)")


class ServedCare:
    """Put before a model class of vLLM; the attribute `care_repair` is a `Repair`."""

    requires_raw_input_tokens = True  # also where there are embeddings: the gate reads ids

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = repair_config(vllm_config.model_config.hf_config)
        check_engine(config, vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.care_repair = Repair(config, vllm_config, self._care_places)

    def _care_places(self, sites: list[Site]) -> dict[Site, Place]:
        language_model = self.get_language_model() if hasattr(self, "get_language_model") else self
        return known_places(language_model.model.layers, sites)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        """As the base's, of tokens that the repair knows."""
        self.care_repair.begin(input_ids)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The base's weights into the base, the repair's tensors into the repair.

        Raises:
            ValueError: the repair is not whole, see `Repair.take`.
        """
        loaded = super().load_weights(self._as_vllm_names(self.care_repair.take(weights)))
        self.care_repair.check(self)
        return loaded

    def _as_vllm_names(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """CLIP and SigLIP towers have a level less in transformers 5 and what it saves than in vLLM."""
        nested = hasattr(getattr(self, "vision_tower", None), "vision_model")
        for name, tensor in weights:
            if nested and TOWER.match(name):
                name = TOWER.sub("vision_tower.vision_model.", name)
            yield name, tensor


class ServedBackend(ServedCare):
    """The same, of vLLM's Transformers backend."""

    def _care_places(self, sites: list[Site]) -> dict[Site, Place]:
        return backend_places(self.model, sites)


@functools.cache
def _made(name: str) -> type[nn.Module]:
    base = name.removeprefix("Care")
    if base == name or base not in (*NATIVE, *BACKEND):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    doc = {"__module__": __name__, "__doc__": f"A repaired {base}."}
    if base in NATIVE:
        return type(name, (ServedCare, ModelRegistry.models[base].load_model_cls()), doc)
    cls = getattr(importlib.import_module("vllm.model_executor.models.transformers"), base)
    return type(base, (ServedBackend, cls), doc)  # by its name vLLM tells whether a model is of its backend


def __getattr__(name: str) -> type[nn.Module]:
    return _made(name)
