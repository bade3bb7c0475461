"""What the configurations and processors of tiny families share."""

import inspect
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, ProcessorMixin

from .text import COMMON, VOCABULARY_SIZE

IMAGE = len(COMMON)  # a family's first special token stands for a piece of an image,
VIDEO = IMAGE + 1  # and its second, where it has one, for a piece of a video
EDGE = 16  # of images and of tiles, in pixels
SQUARE = {"height": EDGE, "width": EDGE}
LAYERS = 4
DEPTH = LAYERS + 1  # of vision towers
WIDTH = 32
HEAD = 16
SPREAD = 0.2  # of the weights: with the default of 0.02 all next tokens are about as likely
WINDOW = 8  # shorter than any prompt with an image
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}


def token_ids(special: Sequence[str]) -> range:
    """The ids that `build_tokenizer` gives to special tokens."""
    return range(IMAGE, IMAGE + len(special))


def decoder(**more: Any) -> dict[str, Any]:
    """The configuration of a text decoder."""
    return {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "max_position_embeddings": 512,
        "initializer_range": SPREAD,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def tower(**more: Any) -> dict[str, Any]:
    """The configuration of a vision tower, deeper than the text decoder."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "image_size": EDGE,
        "patch_size": 4,
        "initializer_range": SPREAD,
        **more,
    }


def count_patches(config: PreTrainedConfig) -> int:
    """How many patches an image has in the vision tower."""
    return (EDGE // config.vision_config.patch_size) ** 2


def without_videos(stock: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class without its video processor, which needs torchvision."""

    class WithoutVideos(stock):
        def __init__(self, image_processor=None, tokenizer=None, **kwargs):
            super().__init__(image_processor, tokenizer, None, **kwargs)

        # SmolVLM's reads off the video processor how to sample frames.
        apply_chat_template = ProcessorMixin.apply_chat_template

    signature = inspect.signature(stock.__init__)  # off which a processor reads its parts, and what it saves
    kept = [parameter for name, parameter in signature.parameters.items() if name != "video_processor"]
    WithoutVideos.__init__.__signature__ = signature.replace(parameters=kept)
    return WithoutVideos
