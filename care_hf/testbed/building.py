"""The untrained testbed model and its processor: stock transformers classes, small sizes."""

from itertools import chain

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from . import world
from .drawing import GLYPHS, GRID, SIZE, TILE

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}<{{ message.role }}>"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'image' %}<image>{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def vocabulary() -> list[str]:
    """Special tokens, single characters, and every word of templates and answers with its leading space mark."""
    by_split = (world.ASKS, world.WRAPPERS, world.SPLITTERS, world.WRITTEN, world.SHOWN, world.VISUAL_QUESTIONS)
    texts = [*chain.from_iterable(t for table in by_split for t in table.values())]
    texts += [*world.KIND_QUESTIONS, *world.READ_QUESTIONS, *world.NAME_QUESTIONS, world.REFUSAL, world.BOTH_HALVES]
    texts += ["step one mix with .", "a hazard .", *world.CATEGORIES, *world.INGREDIENTS, *world.HAZARDOUS]
    texts += [*world.NUMBERS, *world.drawing.SHAPES, *world.drawing.COLOURS]
    words = {word for text in texts for word in text.split() if "{" not in word}
    return [*SPECIAL, "▁", *GLYPHS, *GLYPHS[:26].upper(), "-", *(f"▁{word}" for word in sorted(words))]


def build_processor() -> LlavaProcessor:
    """Known words are one token each, all others are spelled: whole words would not transfer to written images."""
    vocab = {token: index for index, token in enumerate(vocabulary())}
    core = Tokenizer(models.BPE(vocab, merges=[], ignore_merges=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=TILE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """A LLaVA of about 1.5 million parameters, randomly initialised; head size 32, as vLLM on a CPU requires."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=288,
        projection_dim=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=SIZE,
        patch_size=TILE,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=288,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        # 0.02, the default, trains much more slowly at this width.
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model
