"""Families with a processor, an image path or an FFN of their own, and those without images."""

import torch
from torch import nn
from transformers import (
    BlipImageProcessorPil,
    ChameleonConfig,
    ChameleonImageProcessorPil,
    ChameleonProcessor,
    GemmaConfig,
    InstructBlipConfig,
    InstructBlipProcessor,
    Llama4Config,
    Llama4Processor,
    LlamaConfig,
    MllamaConfig,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .family import Family
from .sizes import DEPTH, IMAGE, SPREAD, SQUARE, WIDTH, decoder, token_ids, tower
from .text import VOCABULARY_SIZE, build_tokenizer, chat_template

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


# Llama 3.2: images reach the text by cross-attention, from layer 1 here


def mllama_config() -> MllamaConfig:
    return MllamaConfig(
        text_config=decoder(
            cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        vision_config=tower(
            patch_size=8, num_global_layers=1, intermediate_layers_indices=[1, 3], vision_output_dim=3 * WIDTH
        ),
        image_token_index=IMAGE,
    )


def mllama_processor(config: MllamaConfig) -> MllamaProcessor:
    images = MllamaImageProcessorPil(size=SQUARE, max_image_tiles=config.vision_config.max_num_tiles)
    return MllamaProcessor(images, build_tokenizer(MLLAMA), chat_template("<|image|>"))


def open_gates(model: PreTrainedModel) -> None:
    """The gates of cross-attention begin at 0, so that no image would reach the text."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            nn.init.constant_(parameter, 0.7)


# Llama 4: experts in every second layer


def llama4_config() -> Llama4Config:
    patch, _, start, end, *_ = token_ids(LLAMA4)
    return Llama4Config(
        text_config=decoder(
            intermediate_size_mlp=48,
            interleave_moe_layer_step=2,
            num_local_experts=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        vision_config=tower(
            intermediate_size=128, vision_output_dim=WIDTH, projector_input_dim=WIDTH, projector_output_dim=WIDTH
        ),
        image_token_index=patch,
        boi_token_index=start,
        eoi_token_index=end,
    )


# transformers 5.24.0 reads this off the output of Llama 4's text model, which has none, so that every forward failed.
if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
    MoeCausalLMOutputWithPast.image_outputs = None


class OneTile(PilBackend):
    """In place of Llama 4's image processor, which exists for torchvision only: each image one tile."""

    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    image_mean = image_std = (0.5, 0.5, 0.5)
    resample = PILImageResampling.BILINEAR
    size = SQUARE

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
        **decoder(),
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


def tell_apart(model: PreTrainedModel) -> None:
    """Random codes are far from what images are, so that nearly all images would get the same one."""
    vq, edge = model.model.vqmodel, model.config.vq_config.resolution
    noise = vq.encoder(torch.randn(4, 3, edge, edge))
    vq.quantize.embedding.weight.copy_(vq.quant_conv(noise).movedim(1, -1).flatten(end_dim=-2))


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
    text = decoder(model_type="opt", ffn_dim=48, word_embed_proj_dim=WIDTH, init_std=SPREAD)
    not_of_opt = ("intermediate_size", "num_key_value_heads", "head_dim", "initializer_range")
    return InstructBlipConfig(
        text_config={name: value for name, value in text.items() if name not in not_of_opt},
        vision_config=tower(),
        qformer_config={
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "cross_attention_frequency": 1,
            "initializer_range": SPREAD,
        },
        num_query_tokens=4,
        image_token_index=IMAGE,
        initializer_range=SPREAD,
    )


def instructblip_processor(config: InstructBlipConfig) -> InstructBlipProcessor:
    tokenizers = [build_tokenizer(INSTRUCTBLIP) for _ in range(2)]
    processor = InstructBlipProcessor(
        BlipImageProcessorPil(size=SQUARE), *tokenizers, num_query_tokens=config.num_query_tokens
    )
    processor.chat_template = chat_template("")  # the processor writes the image's tokens
    return processor


def ask(model: PreTrainedModel) -> None:
    """The Q-Former's queries begin at 0, so that all would be the same."""
    nn.init.normal_(model.query_tokens, std=SPREAD)


# Without images


def text_processor(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """A tokenizer alone, as `AutoProcessor` gives for models of text."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = chat_template()
    return tokenizer


def text_family(name: str, kind: type[PreTrainedConfig]) -> Family:
    return Family(name, lambda: kind(**decoder()), text_processor, images="none")


FAMILIES: list[Family] = [
    Family("mllama", mllama_config, mllama_processor, images="equal", adjust=open_gates),
    Family("llama4", llama4_config, llama4_processor, lacks="torchvision"),
    Family("chameleon", chameleon_config, chameleon_processor, adjust=tell_apart, lacks="a chat template"),
    Family(
        "instructblip", instructblip_config, instructblip_processor, images="one", adjust=ask, lacks="a chat template"
    ),
    text_family("llama", LlamaConfig),
    text_family("qwen2", Qwen2Config),
    text_family("gemma", GemmaConfig),
]
