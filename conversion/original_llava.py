"""A checkpoint of the original LLaVA code to a folder of transformers' LlavaForConditionalGeneration, ready for a fit.

Read are the folder of the checkpoint (as liuhaotian/llava-v1.5-7b: config.json with LlavaLlamaForCausalLM, weights in
pytorch_model*.bin or *.safetensors, a tokenizer) and that of its vision tower (as openai/clip-vit-large-patch14-336:
config.json, weights, preprocessor_config.json), which "mm_vision_tower" names and the checkpoint mostly does not hold.

Tensors keep their values; those of the vision tower take the checkpoint's dtype, as in the original code. Every tensor
must have its place and every place its tensor, in the right shape, or nothing is written; only rotary frequencies and
position ids, which follow from the configuration, and CLIP's text half are left out. As in transformers' own converter
the tokens <image> and <pad> are added, and the embeddings grow to a multiple of 64; new rows are the mean of the old,
about which that converter draws them. Images are padded to a square if "image_aspect_ratio" says so.

Refused is what LlavaForConditionalGeneration would run differently: projectors other than mlp2x_gelu, tiled images
(LLaVA 1.6), <im_start> and <im_end> around images, several scales of an image, decoders other than Llama. LoRA and
delta weights are no whole checkpoints and fail as such; merge them first. One tensor at a time is in memory, and one
shard of the output, up to 2 GiB.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safe_files import Shards, run, stream_tensors, tensor_shapes, weight_files, whole
from transformers import (
    AddedToken,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
PROJECTOR = {"0": "linear_1", "2": "linear_2"}
# What the checkpoint's own code runs differently, and the values with which it does not.
PLAIN = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("flat", None),
    "mm_use_im_start_end": (False, None),
    "mm_vision_select_feature": ("patch", "cls_patch", None),
    "image_aspect_ratio": ("pad", "square", None),
    "s2": (False, None),
}
# The conversation of Vicuna 1.5, on which LLaVA 1.5 was trained ("v1" there).
CHAT_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. {% for m in messages %}"
    "{{ 'ASSISTANT: ' if m.role == 'assistant' else 'USER: ' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}"
    "{{ '</s>' if m.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def convert(
    checkpoint: str | Path,
    vision_tower: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    chat_template: str | None = None,
) -> None:
    """Write the folder `out`, whole or not at all; see the module.

    Args:
        checkpoint: folder of the original checkpoint.
        vision_tower: folder of the CLIP model that it names.
        out: the folder to write.
        tokenizer: folder of the tokenizer, if it is not in the checkpoint's.
        chat_template: how conversations are written, as Jinja; by default the tokenizer's, or else Vicuna's.

    Raises:
        ValueError: the checkpoint is of another kind, or its tensors do not fit.
        FileNotFoundError: a file is missing.
    """
    checkpoint, vision_tower = Path(checkpoint), Path(vision_tower)
    original = _read_config(checkpoint)
    words = _tokenizer(Path(tokenizer or checkpoint))
    words.chat_template = chat_template or words.chat_template or CHAT_TEMPLATE
    if "<image>" not in words.chat_template:
        raise ValueError(
            "The tokenizer's chat template writes no <image>, so that images would be lost; give --chat-template, a "
            "file of one that does."
        )
    config = _config(original, vision_tower, words)
    sources = _plan(checkpoint, vision_tower, config, original["vocab_size"])
    with whole(out, folder=True) as folder:
        config.dtype = _write_tensors(folder, sources, config)
        config.architectures = ["LlavaForConditionalGeneration"]
        config.save_pretrained(folder)
        _processor(original, vision_tower, words, config).save_pretrained(folder)
        ids = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ids).save_pretrained(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    original = json.loads((folder / "config.json").read_text())
    if original.get("architectures") != ["LlavaLlamaForCausalLM"]:
        raise ValueError(
            f"{folder} holds {original.get('architectures')}; expected ['LlavaLlamaForCausalLM'], the original LLaVA. "
            "A LlavaForConditionalGeneration needs no conversion."
        )
    if lacking := [key for key in ("vocab_size", "mm_hidden_size", "mm_vision_select_layer") if key not in original]:
        raise ValueError(f"The config.json of {folder} lacks {lacking}; expected that of a whole LLaVA. Copy it again.")
    for key, values in PLAIN.items():
        if original.get(key) not in values:
            raise ValueError(
                f"{folder} has {key}={original.get(key)!r}; expected one of {values}. LlavaForConditionalGeneration "
                "would run it differently, so it is not converted."
            )
    return original


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """That of the folder, with the tokens of images and of padding."""
    with tempfile.TemporaryDirectory() as alone:
        # Beside a config.json of the original code transformers would not know whose tokenizer it is.
        found = [shutil.copy(folder / name, alone) for name in TOKENIZER_FILES if (folder / name).exists()]
        if not found:
            raise FileNotFoundError(f"{folder} has no tokenizer ({TOKENIZER_FILES}); give its folder with --tokenizer.")
        words = AutoTokenizer.from_pretrained(alone, local_files_only=True)
    words.add_tokens(AddedToken("<image>", special=True, normalized=False), special_tokens=True)
    words.add_special_tokens({"pad_token": "<pad>"})
    return words


def _config(original: dict[str, Any], vision_tower: Path, words: PreTrainedTokenizerBase) -> LlavaConfig:
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {"architectures", "model_type", "dtype"}
    text = LlamaConfig(**{key: value for key, value in original.items() if key in known and value is not None})
    rows = original["vocab_size"]
    text.vocab_size = rows if len(words) <= rows else -(-len(words) // 64) * 64
    text.pad_token_id = words.pad_token_id
    vision = CLIPVisionConfig.from_pretrained(vision_tower, local_files_only=True)
    if vision.hidden_size != original["mm_hidden_size"]:
        raise ValueError(
            f"{vision_tower} has a hidden size of {vision.hidden_size}; expected mm_hidden_size="
            f"{original['mm_hidden_size']}, that of {original.get('mm_vision_tower')!r}. Give that model's folder."
        )
    patches = (vision.image_size // vision.patch_size) ** 2
    with_class = original.get("mm_vision_select_feature") == "cls_patch"
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=patches + with_class,
        vision_feature_layer=original["mm_vision_select_layer"],
        vision_feature_select_strategy="full" if with_class else "default",
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _processor(original, vision_tower: Path, words, config: LlavaConfig) -> LlavaProcessor:
    known = LlavaImageProcessorPil().to_dict()
    settings = json.loads((vision_tower / "preprocessor_config.json").read_text())
    images = LlavaImageProcessorPil(**{key: value for key, value in settings.items() if key in known})
    images.do_pad = original.get("image_aspect_ratio") == "pad"
    return LlavaProcessor(
        images,
        words,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=words.chat_template,
        num_additional_image_tokens=1,  # CLIP's class token
    )


# Tensors


def _place(name: str) -> str | None:
    """Where a tensor of the checkpoint belongs in LlavaForConditionalGeneration; None if it is not needed.

    Raises:
        ValueError: it has no place.
    """
    if name.endswith((".rotary_emb.inv_freq", ".embeddings.position_ids")):
        return None
    if name.startswith("model.vision_tower.vision_tower."):
        return _vision_place(name.removeprefix("model.vision_tower.vision_tower."))
    if name.startswith("model.mm_projector."):
        index, _, leaf = name.removeprefix("model.mm_projector.").partition(".")
        return f"model.multi_modal_projector.{PROJECTOR.get(index, index)}.{leaf}"
    if name.startswith(("model.embed_tokens.", "model.layers.", "model.norm.")):
        return f"model.language_model.{name.removeprefix('model.')}"
    if name == "lm_head.weight":
        return name
    raise ValueError(f"The tensor {name!r} has no place in LlavaForConditionalGeneration; nothing was written.")


def _vision_place(name: str) -> str | None:
    """The same for a tensor of a CLIP model, whose text half is not needed."""
    unused = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    if name.startswith(unused) or name.endswith(".embeddings.position_ids"):
        return None
    return f"model.vision_tower.{name.removeprefix('vision_model.')}"


def _plan(checkpoint: Path, vision_tower: Path, config: LlavaConfig, rows: int) -> list[tuple[Path, dict[str, str]]]:
    """Files in turn, each with the place of every tensor that is needed of it; all of them checked.

    Raises:
        ValueError: places and tensors do not match.
    """
    expected = _expected(config, rows)
    sources, seen = [], {}
    for folder, place in ((checkpoint, _place), (vision_tower, _vision_place)):
        if folder == vision_tower and any(name.startswith("model.vision_tower.") for name in seen):
            continue  # trained further, and so in the checkpoint
        for path in weight_files(folder):
            places = {}
            for name, shape in tensor_shapes(path):
                where = place(name)
                if where is None:
                    continue
                if where in seen:
                    raise ValueError(f"{path} and {seen[where]} both hold {name!r}; keep one of the files.")
                if expected.get(where) != shape:
                    raise ValueError(
                        f"{path}: {name!r} is {shape} and would be {where!r}; expected "
                        f"{expected.get(where, 'no such tensor')}. The checkpoint does not fit its config.json."
                    )
                places[name], seen[where] = where, path
            sources.append((path, places))
    missing = sorted(set(expected) - set(seen))
    if missing:
        raise ValueError(
            f"{len(missing)} tensors are in neither {checkpoint} nor {vision_tower}: {', '.join(missing[:5])}. Copy "
            "all weight files; LoRA and delta weights must be merged first."
        )
    return sources


def _expected(config: LlavaConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """Shapes by place, those of embeddings before they grow."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LlavaForConditionalGeneration(config).state_dict().items()}
    shapes |= {name: (rows, *shapes[name][1:]) for name in EMBEDDINGS}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    # Some versions of transformers nest the vision tower once more; they read the flat names as well.
    return {name.replace(".vision_tower.vision_model.", ".vision_tower."): shape for name, shape in shapes.items()}


def _write_tensors(folder: Path, sources: list[tuple[Path, dict[str, str]]], config: LlavaConfig) -> torch.dtype:
    """Write shards and their index; returns the dtype, that of the embeddings."""
    dtype = next(t.dtype for path, places in sources for n, t in stream_tensors(path) if places.get(n) == EMBEDDINGS[0])
    shards = Shards(folder)
    for path, places in sources:
        for name, tensor in stream_tensors(path):
            if name in places:
                grown = places[name] in EMBEDDINGS
                tensor = _grown(tensor, config.text_config.vocab_size) if grown else tensor
                shards.add(places[name], tensor.to(dtype))
    shards.finish()
    return dtype


def _grown(rows: torch.Tensor, count: int) -> torch.Tensor:
    """With rows added up to `count`, each the mean of those before."""
    mean = rows.float().mean(dim=0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(count - len(rows), -1)])


def main(arguments: Sequence[str] | None = None) -> str:
    """The command line; returns what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of the original checkpoint")
    parser.add_argument("--vision-tower", required=True, help="folder of the CLIP model that its config.json names")
    parser.add_argument("--tokenizer", help="folder of the tokenizer, if not that of the checkpoint")
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument("--chat-template", help="file of Jinja; by default the tokenizer's, or else that of Vicuna 1.5")
    given = parser.parse_args(arguments)
    template = Path(given.chat_template).read_text() if given.chat_template else None
    convert(given.checkpoint, given.vision_tower, given.out, given.tokenizer, template)
    return f"wrote {given.out}; load it with AutoModelForImageTextToText and AutoProcessor"


if __name__ == "__main__":
    run(main)
