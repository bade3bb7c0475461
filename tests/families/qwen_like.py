"""Qwen-VL and GLM-V, which see images of any size; Idefics 3 and SmolVLM, which pad them to equal numbers."""

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import (
    Glm4vConfig,
    Glm4vImageProcessorPil,
    Glm4vProcessor,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)
from transformers.image_processing_backends import PilBackend
from transformers.models.smolvlm import processing_smolvlm
from transformers.processing_utils import ProcessorMixin

from .family import Family
from .sizes import DEPTH, EDGE, IMAGE, SPREAD, WIDTH, count_patches, decoder, token_ids, tower, without_videos
from .text import build_tokenizer, chat_template

QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
GLM = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
IDEFICS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")


# Qwen, GLM: images of any size, one token for four patches


def vision_of_any_size(**more: Any) -> dict[str, Any]:
    names = {"num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
    sizes = {names.get(name, name): value for name, value in tower(out_hidden_size=WIDTH, **more).items()}
    return sizes if "image_size" in more else {k: v for k, v in sizes.items() if k != "image_size"}


def multimodal_rope() -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}


def qwen_config(kind: type[PreTrainedConfig], vision: dict[str, Any], **text: Any) -> PreTrainedConfig:
    image, video, start, end = token_ids(QWEN)
    return kind(
        text_config=decoder(rope_parameters=multimodal_rope(), **text),
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )


def qwen2_vl_config() -> Qwen2VLConfig:
    vision = {"depth": DEPTH, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return qwen_config(Qwen2VLConfig, {**vision, "initializer_range": SPREAD})


def qwen2_5_vl_config() -> Qwen2_5_VLConfig:
    return qwen_config(Qwen2_5_VLConfig, vision_of_any_size(window_size=16, fullatt_block_indexes=[1]))


def qwen3_vl_config() -> Qwen3VLConfig:
    vision = vision_of_any_size(deepstack_visual_indexes=[1, 3], num_position_embeddings=16)
    return qwen_config(Qwen3VLConfig, vision)


def qwen3_vl_moe_config() -> Qwen3VLMoeConfig:
    vision = vision_of_any_size(deepstack_visual_indexes=[1, 3], num_position_embeddings=16)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return qwen_config(Qwen3VLMoeConfig, vision, **experts)


def glm4v_config() -> Glm4vConfig:
    image, video, image_start, image_end, video_start, video_end = token_ids(GLM)
    return Glm4vConfig(
        text_config=decoder(rope_parameters=multimodal_rope()),
        vision_config=vision_of_any_size(image_size=EDGE),
        image_token_id=image,
        video_token_id=video,
        image_start_token_id=image_start,
        image_end_token_id=image_end,
        video_start_token_id=video_start,
        video_end_token_id=video_end,
    )


def qwen_processor(kind: type[ProcessorMixin], config: PreTrainedConfig) -> ProcessorMixin:
    size = {"shortest_edge": 64, "longest_edge": 512}  # areas in pixels, 64 to a token
    return without_videos(kind)(
        Qwen2VLImageProcessorPil(patch_size=config.vision_config.patch_size, merge_size=2, size=size),
        build_tokenizer(QWEN),
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def glm4v_processor(config: Glm4vConfig) -> ProcessorMixin:
    size = {"shortest_edge": 128, "longest_edge": 1024}  # areas times 2 frames
    return without_videos(Glm4vProcessor)(
        Glm4vImageProcessorPil(patch_size=config.vision_config.patch_size, merge_size=2, size=size),
        build_tokenizer(GLM),
        chat_template=chat_template("<|begin_of_image|><|image|><|end_of_image|>"),
    )


# Idefics: one token for a square of patches, images padded to equal numbers in each prompt


def idefics_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    return kind(
        text_config=decoder(model_type="llama"),
        vision_config=tower(),
        image_token_id=IMAGE,
        pad_token_id=0,
        scale_factor=2,
    )


def idefics_processor(
    kind: Callable[..., ProcessorMixin], images: type[PilBackend], config: PreTrainedConfig
) -> ProcessorMixin:
    edge = {"longest_edge": EDGE}
    return kind(
        images(size=edge, max_image_size=edge, do_image_splitting=False),
        build_tokenizer(IDEFICS),
        image_seq_len=count_patches(config) // config.scale_factor**2,
        chat_template=chat_template("<image>"),
    )


def smolvlm_processor(config: SmolVLMConfig) -> ProcessorMixin:
    if processing_smolvlm.num2words is None:  # an optional package that spells the number of frames of a video
        processing_smolvlm.num2words = str
    return idefics_processor(without_videos(SmolVLMProcessor), SmolVLMImageProcessorPil, config)


FAMILIES: list[Family] = [
    Family("qwen2_vl", qwen2_vl_config, partial(qwen_processor, Qwen2VLProcessor), lacks="torchvision"),
    Family("qwen2_5_vl", qwen2_5_vl_config, partial(qwen_processor, Qwen2_5_VLProcessor), lacks="torchvision"),
    Family("qwen3_vl", qwen3_vl_config, partial(qwen_processor, Qwen3VLProcessor), lacks="torchvision"),
    Family("qwen3_vl_moe", qwen3_vl_moe_config, partial(qwen_processor, Qwen3VLProcessor), lacks="torchvision"),
    Family("glm4v", glm4v_config, glm4v_processor, lacks="torchvision"),
    Family(
        "idefics3",
        partial(idefics_config, Idefics3Config),
        partial(idefics_processor, Idefics3Processor, Idefics3ImageProcessorPil),
    ),
    Family("smolvlm", partial(idefics_config, SmolVLMConfig), smolvlm_processor, lacks="torchvision"),
]
