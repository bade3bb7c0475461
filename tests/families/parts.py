"""What the configurations and processors of tiny families share."""

from typing import Any

from transformers import PreTrainedConfig, ProcessorMixin

from .text import COMMON, VOCABULARY_SIZE

IMAGE = len(COMMON)  # a family's first special token stands for a piece of an image,
VIDEO = IMAGE + 1  # and its second, where it has one, for a piece of a video
EDGE = 16  # of images, in pixels
SQUARE = {"height": EDGE, "width": EDGE}
LAYERS = 4
WIDTH = 32
WINDOW = 8  # shorter than any prompt with an image
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}


def decoder(kind: str, **more: Any) -> dict[str, Any]:
    """The configuration of a text decoder, its weights large enough that logits differ."""
    return {
        "model_type": kind,
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def tower(kind: str, patch_size: int, **more: Any) -> dict[str, Any]:
    """The configuration of a vision tower, deeper than the text decoder."""
    return {
        "model_type": kind,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS + 1,
        "num_attention_heads": 2,
        "image_size": EDGE,
        "patch_size": patch_size,
        "initializer_range": 0.2,
        **more,
    }


def siglip(patch_size: int) -> dict[str, Any]:
    """The configuration of SigLIP's vision tower without its pooling head, which no family here uses."""
    return tower("siglip_vision_model", patch_size, vision_use_head=False)


def without_videos(stock: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class without its video processor, which needs torchvision."""

    class WithoutVideos(stock):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    return WithoutVideos


def count_patches(config: PreTrainedConfig) -> int:
    """How many patches an image has in the vision tower."""
    return (EDGE // config.vision_config.patch_size) ** 2
