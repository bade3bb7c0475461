"""What the configurations of the tiny models have in common."""

from typing import Any

from .text import COMMON, VOCABULARY_SIZE

SPREAD = 0.2  # of the weights: with the default of 0.02 all next tokens are about as likely
DEPTH = 5  # of the vision towers; the text towers have 3 or 4 layers
PIXELS = {"height": 16, "width": 16}  # of an image, or of a tile of it


def token_ids(special: tuple[str, ...]) -> list[int]:
    """The ids that `build_tokenizer` gives to special tokens."""
    return list(range(len(COMMON), len(COMMON) + len(special)))


def text_sizes(**more: Any) -> dict[str, Any]:
    """What every text decoder is told: 3 layers of width 32, and the ids of the tokenizer."""
    return {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": SPREAD,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def vision_sizes(**more: Any) -> dict[str, Any]:
    """What every vision tower of the usual form is told: images of 16 pixels, patches of 4."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "initializer_range": SPREAD,
        **more,
    }
