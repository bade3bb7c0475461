"""Small configurations of real architectures."""

from transformers import Qwen2_5_VLConfig


def qwen_config(
    vocabulary: int, image: int, video: int, start: int, end: int, *, depth: int = 2, spread: float = 0.02, **text
) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of width 64, 3 text and `depth` vision layers; ids of its image, video, start and end tokens."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": spread,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **text,
        },
        vision_config={
            "depth": depth,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "initializer_range": spread,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
