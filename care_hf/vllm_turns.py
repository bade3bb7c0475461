"""The gate's memory in vLLM: one more layer of its key-value cache, and the operation that fills it.

vLLM manages that layer as any other: its blocks are the requests' own, shared where beginnings are, and given back with
them. The operation is opaque to compilers, as attention is, since what it needs to know of a batch is not in the graph.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from .gating import GateReader
from .paged_turns import PagedBatch, advance

LAYER = "care.turns.100000"  # vLLM wants a layer's index in its name, and each but once
OPERATION = "vllm::care_decide"


class TurnsBackend(AttentionBackend):
    """What vLLM asks of a kind of layer; this one computes no attention."""

    @staticmethod
    def get_name() -> str:
        """As vLLM logs it."""
        return "CARE_TURNS"

    @staticmethod
    def get_impl_cls():
        """None, for nothing is computed."""
        raise NotImplementedError("The layer of the gate's memory computes no attention.")

    @staticmethod
    def get_builder_cls():
        """What describes a batch."""
        return TurnsBuilder


class TurnsBuilder(AttentionMetadataBuilder[PagedBatch]):
    """Describes a batch by tensors of vLLM that stay where they are, so that graphs can be recorded."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build: bool = False) -> PagedBatch:
        """From what vLLM knows of the batch."""
        common = common_attn_metadata
        return PagedBatch(
            common.query_start_loc,
            common.seq_lens,
            common.slot_mapping,
            common.block_table_tensor,
            self.kv_cache_spec.block_size,
        )


@dataclass(eq=False)
class Turns:
    """What the repaired modules of a model share.

    Attributes:
        packed: int64 (most tokens of a batch,), filled by the gate: as `gating.pack` packs it.
        visual: bool, the same length, True at image and video tokens; filled before each forward, if anything asks.
    """

    packed: torch.Tensor
    visual: torch.Tensor


class TurnCache(nn.Module, AttentionLayerBase):
    """The layer: the ids of tokens and what is packed of them, in place of keys and values.

    Args:
        vllm_config: of the engine.
        prompt_end: see `gating.Gate`.
        images: the ids of placeholders.
    """

    def __init__(self, vllm_config: VllmConfig, prompt_end: tuple[int, ...], images: tuple[int, ...]):
        super().__init__()
        self.prompt_end, self.images = prompt_end, images
        self.kv_cache = torch.tensor([])
        self.ids: torch.Tensor | None = None
        self._gate: list[GateReader] = []  # in a list, so as not to be a part of this module
        layers = vllm_config.compilation_config.static_forward_context
        if LAYER in layers:
            raise ValueError(f"There are two layers {LAYER!r}; serve one repaired model in an engine.")
        layers[LAYER] = self
        splitting = vllm_config.compilation_config.splitting_ops
        if splitting and OPERATION not in splitting:
            splitting.append(OPERATION)  # graphs of pieces are recorded without what a batch looks like

    def read_by(self, gate: GateReader) -> None:
        """Let `gate` decide."""
        self._gate[:] = [gate]

    def get_attn_backend(self) -> type[AttentionBackend]:
        """`TurnsBackend`."""
        return TurnsBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> FullAttentionSpec:
        """Two int64 a token, a whole copy in every process."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            max_tp_shards=1,
            head_size=1,
            head_size_v=1,
            dtype=torch.int64,
        )

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """From (blocks, 1, block_size, 2)."""
        self.kv_cache = kv_cache.squeeze(1)

    def decide(self, h: torch.Tensor, packed: torch.Tensor) -> None:
        """Fill `packed` for the tokens of h (N, d), as the gate decides."""
        batch, count = _described(get_forward_context().attn_metadata), len(h)
        known = 0 if batch is None else min(len(batch.slots), count)
        if known:
            ids = self.ids[:known]
            found = advance(self.kv_cache, batch, ids, h[:known], self._gate[0], self.prompt_end, self.images)
            packed[:known] = found
        packed[known:count] = 0


def _described(metadata: Any) -> PagedBatch | None:
    """That of this forward; None where vLLM tries the model out before there is a cache."""
    if metadata is None:
        return None
    if not isinstance(metadata, dict) or LAYER not in metadata:
        raise ValueError(
            "vLLM describes this batch in a way that the gate's memory does not know, so nothing can be decided; serve "
            "without dual batch overlap and without speculative drafts from the repaired model itself."
        )
    return metadata[LAYER]


def _decide(h: torch.Tensor, packed: torch.Tensor) -> None:
    get_forward_context().no_compile_layers[LAYER].decide(h, packed)


def _decide_fake(h: torch.Tensor, packed: torch.Tensor) -> None:
    return None


if not hasattr(torch.ops.vllm, "care_decide"):
    direct_register_custom_op("care_decide", _decide, mutates_args=["packed"], fake_impl=_decide_fake)
