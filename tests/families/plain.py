"""Families whose images come as tokens of the prompt and whose text decoder is a common one."""

import importlib
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from torch import nn
from transformers import (
    AyaVisionConfig,
    AyaVisionProcessor,
    CLIPImageProcessorPil,
    DeepseekVLConfig,
    DeepseekVLImageProcessorPil,
    DeepseekVLProcessor,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLProcessor,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Mistral3Config,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PixtralImageProcessorPil,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipImageProcessorPil,
)
from transformers.models.pixtral import image_processing_pil_pixtral

from .family import Family
from .sizes import (
    ALTERNATING,
    EDGE,
    HEAD,
    IMAGE,
    SPREAD,
    SQUARE,
    VIDEO,
    WIDTH,
    WINDOW,
    count_patches,
    decoder,
    tower,
    without_videos,
)
from .text import VOCABULARY_SIZE, build_tokenizer, chat_template

TILINGS = [[EDGE, EDGE], [EDGE, 2 * EDGE], [2 * EDGE, EDGE]]


def image_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the families that only know an image token."""
    return build_tokenizer(special=["<image>"], image_token="<image>")


def siglip(**more: Any) -> dict[str, Any]:
    """The configuration of SigLIP's vision tower without its pooling head, which no family here uses."""
    return tower(model_type="siglip_vision_model", vision_use_head=False, **more)


def clip_tokens(config: LlavaConfig | LlavaNextConfig) -> dict[str, Any]:
    """What the processor must know of CLIP's tower to count an image's tokens."""
    return {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,  # the class token
    }


def load_pixtral_processor() -> type[ProcessorMixin]:
    """Pixtral's processor class.

    Of torchvision's image processor its module only wants a function that Pillow's has, too.
    """
    name = image_processing_pil_pixtral.__name__.replace("_pil", "")
    with patch.dict(sys.modules, {name: image_processing_pil_pixtral}):
        module = importlib.import_module("transformers.models.pixtral.processing_pixtral")
    return sys.modules.setdefault(module.__name__, module).PixtralProcessor


def llava_config() -> LlavaConfig:
    return LlavaConfig(
        text_config=decoder(model_type="llama"),
        vision_config=tower(model_type="clip_vision_model", patch_size=8),
        image_token_index=IMAGE,
        image_seq_length=4,
    )


def llava_processor(config: LlavaConfig) -> LlavaProcessor:
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size=SQUARE),
        image_tokenizer(),
        **clip_tokens(config),
        chat_template=chat_template(),
    )


def llava_next_config() -> LlavaNextConfig:
    return LlavaNextConfig(
        text_config=decoder(model_type="mistral", sliding_window=None),
        vision_config=tower(model_type="clip_vision_model", patch_size=8),
        image_token_index=IMAGE,
        image_grid_pinpoints=TILINGS,
    )


def llava_next_processor(config: LlavaNextConfig) -> LlavaNextProcessor:
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": EDGE}, crop_size=SQUARE, image_grid_pinpoints=TILINGS),
        image_tokenizer(),
        **clip_tokens(config),
        chat_template=chat_template(),
    )


def llava_onevision_config() -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        text_config=decoder(model_type="qwen2"),
        vision_config=siglip(patch_size=8),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=TILINGS,
    )


def llava_onevision_processor(config: LlavaOnevisionConfig) -> ProcessorMixin:
    return without_videos(LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=TILINGS),
        build_tokenizer(special=["<image>", "<video>"], image_token="<image>", video_token="<video>"),
        num_image_tokens=count_patches(config),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=chat_template(),
    )


def llava_pixtral_config() -> LlavaConfig:
    return LlavaConfig(
        text_config=decoder(model_type="mistral", sliding_window=None),
        vision_config=tower(model_type="pixtral", patch_size=8),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def mistral3_config() -> Mistral3Config:
    return Mistral3Config(
        text_config=decoder(model_type="mistral", sliding_window=WINDOW),
        vision_config=tower(model_type="pixtral"),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def pixtral_processor(config: LlavaConfig | Mistral3Config) -> ProcessorMixin:
    patch_size = config.vision_config.patch_size
    return load_pixtral_processor()(
        PixtralImageProcessorPil(size={"longest_edge": EDGE}, patch_size=patch_size),
        build_tokenizer(special=["[IMG]", "[IMG_BREAK]", "[IMG_END]"], image_token="[IMG]"),
        patch_size=patch_size,
        spatial_merge_size=getattr(config, "spatial_merge_size", 1),
        chat_template=chat_template("[IMG]"),
    )


def internvl_config() -> InternVLConfig:
    return InternVLConfig(
        text_config=decoder(model_type="qwen2"),
        vision_config=tower(model_type="internvl_vision"),
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def internvl_processor(config: InternVLConfig) -> ProcessorMixin:
    named = {
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
    }
    return without_videos(InternVLProcessor)(
        GotOcr2ImageProcessorPil(size=SQUARE, max_patches=2),
        build_tokenizer(special=[*named.values()], **named),
        image_seq_length=config.image_seq_length,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )


def aya_vision_config() -> AyaVisionConfig:
    return AyaVisionConfig(
        text_config=decoder(model_type="cohere2", logit_scale=1.0, **ALTERNATING),
        vision_config=siglip(),
        image_token_index=IMAGE,
    )


def aya_vision_processor(config: AyaVisionConfig) -> AyaVisionProcessor:
    markers = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_1", "TILE_2", "TILE_GLOBAL"]
    return AyaVisionProcessor(
        GotOcr2ImageProcessorPil(size=SQUARE, max_patches=2),
        build_tokenizer(special=["<|IMG_PATCH|>", *markers, "<image>"]),
        patch_size=config.vision_config.patch_size,
        img_size=EDGE,
        downsample_factor=config.downsample_factor,
        chat_template=chat_template(),
    )


def deepseek_vl_config() -> DeepseekVLConfig:
    return DeepseekVLConfig(
        text_config=decoder(model_type="llama"),
        vision_config=siglip(patch_size=8),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def deepseek_vl_processor(config: DeepseekVLConfig) -> DeepseekVLProcessor:
    return DeepseekVLProcessor(
        DeepseekVLImageProcessorPil(size=SQUARE, min_size=4),
        image_tokenizer(),
        num_image_tokens=count_patches(config),
        chat_template=chat_template(),
    )


def paligemma_config(kind: str, **more: Any) -> Callable[[], PaliGemmaConfig]:
    def config() -> PaliGemmaConfig:
        return PaliGemmaConfig(
            text_config=decoder(model_type=kind, **more),
            vision_config=siglip(patch_size=8),
            image_token_index=IMAGE,
            vocab_size=VOCABULARY_SIZE,
            projection_dim=WIDTH,
            hidden_size=WIDTH,
        )

    return config


def paligemma_processor(config: PaliGemmaConfig) -> PaliGemmaProcessor:
    return PaliGemmaProcessor(
        SiglipImageProcessorPil(size=SQUARE, image_seq_length=config.text_config.num_image_tokens),
        image_tokenizer(),
        chat_template=chat_template().removeprefix("<s>"),  # the processor puts it behind the images
    )


def gemma3_config() -> Gemma3Config:
    return Gemma3Config(
        text_config=decoder(model_type="gemma3_text", query_pre_attn_scalar=HEAD, **ALTERNATING),
        vision_config=siglip(),
        image_token_index=IMAGE,
        boi_token_index=IMAGE + 1,
        eoi_token_index=IMAGE + 2,
        mm_tokens_per_image=4,
        initializer_range=SPREAD,
    )


def gemma3_processor(config: Gemma3Config) -> Gemma3Processor:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE),
        build_tokenizer(special=[*named.values()], **named),
        image_seq_length=config.mm_tokens_per_image,
        chat_template=chat_template("<start_of_image>"),
    )


def open_eyes(model: PreTrainedModel) -> None:
    """Gemma 3's projector begins at 0, so that every image would be the same."""
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=SPREAD)


FAMILIES: list[Family] = [
    Family("llava", llava_config, llava_processor),
    Family("llava_next", llava_next_config, llava_next_processor),
    Family("llava_onevision", llava_onevision_config, llava_onevision_processor, lacks="torchvision"),
    Family("llava+pixtral", llava_pixtral_config, pixtral_processor, lacks="torchvision"),
    Family("mistral3", mistral3_config, pixtral_processor, lacks="torchvision"),
    Family("internvl", internvl_config, internvl_processor, lacks="torchvision"),
    Family("aya_vision", aya_vision_config, aya_vision_processor),
    Family("deepseek_vl", deepseek_vl_config, deepseek_vl_processor),
    Family("paligemma", paligemma_config("gemma"), paligemma_processor),
    Family(
        "paligemma2",
        paligemma_config("gemma2", query_pre_attn_scalar=HEAD, **ALTERNATING),
        paligemma_processor,
    ),
    Family("gemma3", gemma3_config, gemma3_processor, adjust=open_eyes),
]
