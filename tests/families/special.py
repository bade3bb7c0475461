"""Families with a processor, an image path or an FFN of their own, and those without images."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import (
    BlipImageProcessorPil,
    ChameleonConfig,
    ChameleonImageProcessorPil,
    ChameleonProcessor,
    GemmaConfig,
    Glm4vConfig,
    Glm4vImageProcessorPil,
    Glm4vProcessor,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipProcessor,
    Llama4Config,
    Llama4Processor,
    LlamaConfig,
    MllamaConfig,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
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
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.smolvlm import processing_smolvlm
from transformers.processing_utils import ProcessorMixin

from .family import Family
from .text import COMMON, VOCABULARY_SIZE, build_tokenizer, chat_template

SPREAD = 0.2  # of the weights: with the default of 0.02 all next tokens are about as likely
DEPTH = 5  # of the vision towers; the text towers have 3 or 4 layers
PIXELS = {"height": 16, "width": 16}

QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
GLM = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
IDEFICS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
MLLAMA = ("<|image|>", "<|python_tag|>")
LLAMA4 = (
    "<|patch|>",
    "<|image|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)
CHAMELEON = ("<image>", "<racm3:break>", "<eoss>", "<sep>")
INSTRUCTBLIP = ("<image>",)

ONE_IMAGE = ("instructblip",)  # families each of whose prompts has exactly one image


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


# Qwen, GLM: images of any size, one token for four patches


def vision_of_any_size(**more: Any) -> dict[str, Any]:
    names = {"num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
    sizes = {names.get(name, name): value for name, value in vision_sizes(out_hidden_size=32, **more).items()}
    return sizes if "image_size" in more else {k: v for k, v in sizes.items() if k != "image_size"}


def multimodal_rope() -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}


def qwen_config(kind: type[PreTrainedConfig], vision: dict[str, Any], **text: Any) -> PreTrainedConfig:
    image, video, start, end = token_ids(QWEN)
    return kind(
        text_config=text_sizes(rope_parameters=multimodal_rope(), **text),
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )


def qwen2_vl_config() -> Qwen2VLConfig:
    vision = {"depth": DEPTH, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
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
        text_config=text_sizes(rope_parameters=multimodal_rope()),
        vision_config=vision_of_any_size(image_size=16),
        image_token_id=image,
        video_token_id=video,
        image_start_token_id=image_start,
        image_end_token_id=image_end,
        video_start_token_id=video_start,
        video_end_token_id=video_end,
    )


def without_videos(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The stock processor without its video processor, which needs torchvision."""

    class ImageProcessor(kind):
        def __init__(self, image_processor=None, tokenizer=None, **kwargs):
            super().__init__(image_processor, tokenizer, None, **kwargs)

        # SmolVLM's reads off the video processor how to sample frames.
        apply_chat_template = ProcessorMixin.apply_chat_template

    signature = inspect.signature(kind.__init__)  # off which a processor reads its parts, and what it saves
    kept = [parameter for name, parameter in signature.parameters.items() if name != "video_processor"]
    ImageProcessor.__init__.__signature__ = signature.replace(parameters=kept)
    return ImageProcessor


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
        text_config=text_sizes(model_type="llama"),
        vision_config=vision_sizes(),
        image_token_id=token_ids(IDEFICS)[0],
        pad_token_id=0,
        scale_factor=2,
    )


def idefics_processor(
    kind: Callable[..., ProcessorMixin], images: type[PilBackend], config: PreTrainedConfig
) -> ProcessorMixin:
    edge = {"longest_edge": config.vision_config.image_size}
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return kind(
        images(size=edge, max_image_size=edge, do_image_splitting=False),
        build_tokenizer(IDEFICS),
        image_seq_len=patches // config.scale_factor**2,
        chat_template=chat_template("<image>"),
    )


def smolvlm_processor(config: SmolVLMConfig) -> ProcessorMixin:
    if processing_smolvlm.num2words is None:  # an optional package that spells the number of frames of a video
        processing_smolvlm.num2words = str
    return idefics_processor(without_videos(SmolVLMProcessor), SmolVLMImageProcessorPil, config)


# Llama 3.2: images reach the text by cross-attention, from layer 1 here


def mllama_config() -> MllamaConfig:
    return MllamaConfig(
        text_config=text_sizes(
            num_hidden_layers=4,
            cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        vision_config=vision_sizes(
            patch_size=8, num_global_layers=1, intermediate_layers_indices=[1, 3], vision_output_dim=3 * 32
        ),
        image_token_index=token_ids(MLLAMA)[0],
    )


def mllama_processor(config: MllamaConfig) -> MllamaProcessor:
    images = MllamaImageProcessorPil(size=PIXELS, max_image_tiles=config.vision_config.max_num_tiles)
    return MllamaProcessor(images, build_tokenizer(MLLAMA), chat_template("<|image|>"))


# Llama 4: experts in every second layer


def llama4_config() -> Llama4Config:
    patch, _, start, end, *_ = token_ids(LLAMA4)
    return Llama4Config(
        text_config=text_sizes(
            num_hidden_layers=4,
            intermediate_size_mlp=48,
            interleave_moe_layer_step=2,
            num_local_experts=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        vision_config=vision_sizes(
            intermediate_size=128, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32
        ),
        image_token_index=patch,
        boi_token_index=start,
        eoi_token_index=end,
    )


# transformers 5.24.0 reads this off the output of Llama 4's text model, which has none: no image could be shown to it.
if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
    MoeCausalLMOutputWithPast.image_outputs = None


class OneTile(PilBackend):
    """In place of Llama 4's image processor, which exists for torchvision only: each image one tile."""

    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    image_mean = image_std = (0.5, 0.5, 0.5)
    resample = PILImageResampling.BILINEAR
    size = PIXELS

    def _preprocess(self, images, **kwargs):
        features = super()._preprocess(images, **kwargs)
        features["aspect_ratios"] = [(1, 1)] * len(images)
        return features


def llama4_processor(config: Llama4Config) -> Llama4Processor:
    return Llama4Processor(
        OneTile(),
        build_tokenizer(LLAMA4),
        patch_size=config.vision_config.patch_size,
        chat_template=chat_template("<|image|>"),
    )


# Chameleon: images become tokens of the vocabulary


def chameleon_config() -> ChameleonConfig:
    codes = 16
    first = VOCABULARY_SIZE - codes  # tokens that no text has
    names = ["".join(chr(ord("A") + int(digit)) for digit in str(code)) for code in range(codes)]
    return ChameleonConfig(
        **text_sizes(),
        vq_config={
            "num_embeddings": codes,
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1] * DEPTH,
            "num_res_blocks": 1,
            "resolution": 32,
        },
        vocabulary_map={
            **dict(zip(CHAMELEON, token_ids(CHAMELEON), strict=True)),
            **{f"IMGIMG{name}Z": first + code for code, name in enumerate(names)},
        },
    )


def chameleon_processor(config: ChameleonConfig) -> ChameleonProcessor:
    edge = config.vq_config.resolution
    processor = ChameleonProcessor(
        ChameleonImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}),
        build_tokenizer(CHAMELEON, sep_token="<sep>"),
        image_seq_length=(edge // 2 ** (len(config.vq_config.channel_multiplier) - 1)) ** 2,
    )
    processor.chat_template = chat_template("<image>")
    processor.return_for_text_completion = True  # else it writes <sep> after the template's generation prompt
    return processor


# InstructBLIP: the image's tokens before everything else, computed with the prompt in view


def instructblip_config() -> InstructBlipConfig:
    text = text_sizes(model_type="opt", ffn_dim=48, word_embed_proj_dim=32, init_std=SPREAD)
    not_of_opt = ("intermediate_size", "num_key_value_heads", "head_dim", "initializer_range")
    return InstructBlipConfig(
        text_config={name: value for name, value in text.items() if name not in not_of_opt},
        vision_config=vision_sizes(),
        qformer_config={
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "cross_attention_frequency": 1,
            "initializer_range": SPREAD,
        },
        num_query_tokens=4,
        image_token_index=token_ids(INSTRUCTBLIP)[0],
        initializer_range=SPREAD,
    )


def instructblip_processor(config: InstructBlipConfig) -> InstructBlipProcessor:
    tokenizers = [build_tokenizer(INSTRUCTBLIP) for _ in range(2)]
    processor = InstructBlipProcessor(
        BlipImageProcessorPil(size=PIXELS), *tokenizers, num_query_tokens=config.num_query_tokens
    )
    processor.chat_template = chat_template("")  # the processor writes the image's tokens
    return processor


# Without images


class TextProcessor(ProcessorMixin):
    """A tokenizer whose chat template is applied as that of a VLM's processor."""

    def __init__(self, tokenizer=None, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)


def text_family(name: str, kind: type[PreTrainedConfig]) -> Family:
    return Family(
        name,
        config=lambda: kind(**text_sizes()),
        processor=lambda config: TextProcessor(build_tokenizer(), chat_template()),
        text_only=True,
    )


FAMILIES: list[Family] = [
    Family("qwen2_vl", qwen2_vl_config, functools.partial(qwen_processor, Qwen2VLProcessor)),
    Family("qwen2_5_vl", qwen2_5_vl_config, functools.partial(qwen_processor, Qwen2_5_VLProcessor)),
    Family("qwen3_vl", qwen3_vl_config, functools.partial(qwen_processor, Qwen3VLProcessor)),
    Family("qwen3_vl_moe", qwen3_vl_moe_config, functools.partial(qwen_processor, Qwen3VLProcessor)),
    Family("glm4v", glm4v_config, glm4v_processor),
    Family(
        "idefics3",
        functools.partial(idefics_config, Idefics3Config),
        functools.partial(idefics_processor, Idefics3Processor, Idefics3ImageProcessorPil),
    ),
    Family("smolvlm", functools.partial(idefics_config, SmolVLMConfig), smolvlm_processor),
    Family("mllama", mllama_config, mllama_processor),
    Family("llama4", llama4_config, llama4_processor),
    Family("chameleon", chameleon_config, chameleon_processor),
    Family("instructblip", instructblip_config, instructblip_processor),
    text_family("llama", LlamaConfig),
    text_family("qwen2", Qwen2Config),
    text_family("gemma", GemmaConfig),
]
