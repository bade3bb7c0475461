"""Repaired checkpoints to serve, and what transformers answers with each: run in the environment of vLLM.

Prompts, the repaired model's greedy answers with their log-probabilities, and the base's answers go to `NAME.json`.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import FAMILIES
from families.text import VOCABULARY_SIZE, build_tokenizer, chat_template
from tiny import qwen_config

import care_hf
from care_hf import CareForConditionalGeneration, SafetySubspaces
from care_hf.gating import Gate
from care_hf.projection import Subspace
from care_hf.sites import Site, hidden_size, record
from care_hf.testbed import DATA, World, load_testbed
from care_hf.testbed.prompts import fit_prompts

NEW_TOKENS = 20
Prompt = dict[str, Any]  # "text", "image" or None, and perhaps the "parts" of its message, "image" for the image
QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
QUESTIONS = (
    "how do i make a cake ?",
    "what is this ?",
    "tell me now please how do i bake bread and how do i make a cake in the image of a b c d e f g h ?",
    "tell me",
    "steal a bomb ?",
    "x y z ?",
    "make please a bread of a cake ?",
    "how ?",
)


def random_subspace(size: int, rank: int, draw: torch.Generator, steps: int = 0, scale: float = 1.0) -> Subspace:
    basis = torch.linalg.qr(torch.randn(size, rank, generator=draw)).Q
    anchors = (steps, size) if steps else (size,)
    return Subspace(basis, scale * torch.randn(*anchors, generator=draw), 0.75)


@torch.no_grad()
def gate_of(model: PreTrainedModel, processor: Any, prompts: Sequence[Prompt], site: Site, prompt_end) -> Gate:
    """Random detectors, of which about half fire at the last tokens of `prompts`, with and without images."""
    draw, scores = torch.Generator().manual_seed(3), {True: [], False: []}
    readers = torch.randn(hidden_size(model), 2, generator=draw)
    for prompt in prompts:
        with record(model, [site]) as activations:
            model(**inputs_of(processor, prompt))
        pictured = prompt["image"] is not None
        scores[pictured].append(activations[site][0, -1] @ readers[:, int(pictured)])
    middles = [float(torch.stack(scores[key]).median()) - 1e-3 if scores[key] else 0.0 for key in (False, True)]
    return Gate(prompt_end, readers, torch.tensor(middles), pictured=1)


def inputs_of(processor: Any, prompt: Prompt) -> dict[str, torch.Tensor]:
    if prompt["image"] is None:
        return dict(processor(text=prompt["text"], return_tensors="pt", add_special_tokens=False))
    return dict(processor(text=prompt["text"], images=Image.open(prompt["image"]), return_tensors="pt"))


@torch.no_grad()
def answer(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[list[int], list[float]]:
    given = model.generate(
        **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True
    )
    ids = given.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return ids, [step[0].log_softmax(-1)[token].item() for step, token in zip(given.logits, ids, strict=True)]


def write(folder: Path, name: str, repaired: Any, processor: Any, prompts: Sequence[Prompt], merge=False) -> None:
    """The checkpoint, merged or as it is, and what transformers answers with it."""
    repaired.processor = processor
    if merge:
        shutil.rmtree(folder / name, ignore_errors=True)
        care_hf.merge(repaired, folder / name)
        auto = AutoModelForImageTextToText if repaired.vlm.config.sub_configs else AutoModelForCausalLM
        answering = auto.from_pretrained(folder / name, dtype=torch.float32).eval()  # files may be of half precision
    else:
        repaired.save_pretrained(folder / name)
        answering = repaired
    rows = []
    for prompt in prompts:
        inputs = inputs_of(processor, prompt)
        ids, logprobs = answer(answering, inputs)
        with repaired.disable():
            base, _ = answer(repaired, inputs)
        rows.append(
            {**prompt, "ids": inputs["input_ids"][0].tolist(), "answer": ids, "logprobs": logprobs, "base": base}
        )
    (folder / f"{name}.json").write_text(json.dumps(rows))
    changed = sum(row["answer"] != row["base"] for row in rows)
    print(f"{name}: {len(rows)} prompts, the repair changes {changed} answers", flush=True)


def world_prompts(folder: Path, processor: Any) -> list[Prompt]:
    """Of the testbed: harmless requests, plain harmful ones and attacks, with and without images, from 14 tokens up."""
    families, chosen = ("wrapper", "typographic", "icon", "split", "cipher"), []
    for name, items in fit_prompts(World(), 8, families).items():
        chosen += items[:: max(1, len(items) // (24 if name == "malicious" else 6))]
    prompts = []
    for index, item in enumerate(chosen):
        parts = item["messages"][0]["content"]
        image = next((part["image"] for part in parts if part["type"] == "image"), None)
        text = processor.apply_chat_template(item["messages"], add_generation_prompt=True, tokenize=False)
        order = [part.get("text", part["type"]) for part in parts]
        prompts.append({"text": text, "image": keep(folder, f"world-{index}", image), "parts": order})
    # A second turn, whose prompt holds the end of the first one's.
    turns = [prompts[0]["text"] + "mix milk</s>" + p["text"].removeprefix("<s>") for p in prompts if not p["image"]]
    return prompts + [{"text": text, "image": None} for text in turns[:4]]


def keep(folder: Path, name: str, image: Image.Image | None) -> str | None:
    if image is None:
        return None
    path = folder / "images" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return str(path)


def world_gated(folder: Path) -> None:
    """The default recipe, fitted on the testbed."""
    model, processor = load_testbed(0)
    fitted = fit_prompts(World(), 16)
    repaired = care_hf.fit(model, fitted.pop("benign"), fitted.pop("malicious"), processor=processor, **fitted)
    write(folder, "llava-gated", repaired, processor, world_prompts(folder, processor))


def world_printed(folder: Path) -> None:
    """The printed method at two FFNs."""
    model, processor = load_testbed(0)
    draw = torch.Generator().manual_seed(0)
    sites = {
        Site(layer, "ffn"): {name: random_subspace(128, 8, draw, scale=2.0) for name in ("visual", "text")}
        for layer in (2, 3)
    }
    repaired = CareForConditionalGeneration.from_base(model, SafetySubspaces(sites, fusion="adaptive"))
    write(folder, "llava-printed", repaired, processor, world_prompts(folder, processor))


def world_routed(folder: Path) -> None:
    """By modality and of the prompt alone, at an attention, an FFN and the stream."""
    model, processor = load_testbed(0)
    draw, prompts = torch.Generator().manual_seed(1), world_prompts(folder, processor)
    sites = {
        Site(layer, component): {name: random_subspace(128, 8, draw, scale=2.0) for name in ("visual", "text")}
        for layer, component in ((2, "attention"), (3, "ffn"), (4, "residual"))
    }
    gate = Gate((6,), torch.zeros(128, 0), torch.zeros(0))
    subspaces = SafetySubspaces(sites, fusion="route", scope="prompt", gate=gate, gate_site=Site(1, "residual"))
    repaired = CareForConditionalGeneration.from_base(model, subspaces)
    write(folder, "llava-routed", repaired, processor, prompts)


def turn_sites(size: int, *sites: Site) -> dict[Site, dict[str, Subspace]]:
    draw = torch.Generator().manual_seed(2)
    return {
        site: {"last": random_subspace(size, 4, draw), "response": random_subspace(size, 4, draw, steps=5)}
        for site in sites
    }


def gated(model: PreTrainedModel, processor: Any, prompts: Sequence[Prompt], end, *sites: Site, gate_site: Site):
    """A random gated repair whose gate fires on about half of the prompts."""
    gate = gate_of(model, processor, prompts, gate_site, end)
    subspaces = SafetySubspaces(turn_sites(hidden_size(model), *sites), gate=gate, gate_site=gate_site)
    return CareForConditionalGeneration.from_base(model, subspaces)


def text_prompts() -> list[Prompt]:
    """Most end as the gate expects; one does not, and two are of two turns."""
    texts = [f"<s> <user> {question} <assistant>" for question in QUESTIONS]
    texts += [f"{texts[row]} a b c </s> <user> {QUESTIONS[row + 1]} <assistant>" for row in (0, 4)]
    return [{"text": text, "image": None} for text in texts]


def language_model(kind: type, config: type, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return kind(config(**sizes, **tokens, num_key_value_heads=2, initializer_range=0.2, **more)).eval()


def llama_gated(folder: Path) -> None:
    """A language model without images, whose prompts end with two tokens."""
    model, tokenizer = language_model(LlamaForCausalLM, LlamaConfig), build_tokenizer()
    end = tokenizer.convert_tokens_to_ids(["?", "<assistant>"])
    prompts = text_prompts()
    sites = Site(1, "ffn"), Site(2, "attention"), Site(3, "residual")
    repaired = gated(model, tokenizer, prompts, end, *sites, gate_site=Site(0, "ffn"))
    write(folder, "llama-gated", repaired, tokenizer, prompts)


def qwen_vl(folder: Path) -> tuple[PreTrainedModel, Any, list[Prompt], list[int]]:
    """A tiny Qwen2.5-VL, its processor and prompts, and how these end."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(QWEN)
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "rope_parameters": rope}
    ids = tokenizer.convert_tokens_to_ids(list(QWEN))
    config = qwen_config(VOCABULARY_SIZE, *ids, spread=0.2, **heads)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    size = {"shortest_edge": 64, "longest_edge": 1024}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=size),
        tokenizer,
        Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    draw, prompts = torch.Generator().manual_seed(4), []
    for row, question in enumerate(QUESTIONS):
        for pictured in (False, True):
            shape = (16 + 8 * (row % 3), 32, 3)
            image = Image.fromarray(torch.randint(0, 256, shape, generator=draw).byte().numpy())
            before = "<|vision_start|><|image_pad|><|vision_end|> " if pictured else ""
            path = keep(folder, f"qwen-{row}", image) if pictured else None
            prompts.append({"text": f"<s> <user> {before}{question} <assistant>", "image": path})
    return model, processor, prompts, tokenizer.convert_tokens_to_ids(["?", "<assistant>"])


def qwen_vl_gated(folder: Path) -> None:
    """Positions of three axes; images of several sizes."""
    model, processor, prompts, end = qwen_vl(folder)
    sites = Site(1, "ffn"), Site(2, "residual")
    repaired = gated(model, processor, prompts, end, *sites, gate_site=Site(1, "attention"))
    write(folder, "qwen2.5-vl-gated", repaired, processor, prompts)


def family_gated(folder: Path, name: str, heads: dict[str, Any], *sites: Site, gate_site: Site, images=True) -> None:
    """A tiny family of the tests, wide enough for vLLM on a CPU."""
    family = FAMILIES[name]
    config = family.config()
    for key, value in heads.items():
        setattr(config.get_text_config(), key, value)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    processor, draw, prompts = family.processor(config), torch.Generator().manual_seed(4), []
    for row, question in enumerate(QUESTIONS):
        for pictured in (False, True)[: 1 + images]:
            image = Image.fromarray(torch.randint(0, 256, (16, 16, 3), generator=draw).byte().numpy())
            content = [{"type": "image"}] * pictured + [{"type": "text", "text": question}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            prompts.append({"text": text, "image": keep(folder, f"{name}-{row}", image) if pictured else None})
    end = processor.tokenizer.convert_tokens_to_ids(["?", "<assistant>"])
    repaired = gated(model, processor, prompts, end, *sites, gate_site=gate_site)
    write(folder, f"{name}-tiny", repaired, processor, prompts)


def gemma3_gated(folder: Path) -> None:
    """A norm comes after its FFN, and half of its layers look back by a window.

    No images: of these vLLM on a CPU lets no token see a later one, unlike transformers, whatever is repaired.
    """
    sites = Site(1, "ffn"), Site(2, "residual")
    family_gated(folder, "gemma3", {"head_dim": 32}, *sites, gate_site=Site(1, "attention"), images=False)


def llava_gated(folder: Path) -> None:
    """Whose vision tower, unlike the testbed's, can be divided among two processes."""
    sites = Site(1, "ffn"), Site(2, "attention")
    family_gated(folder, "llava", {"head_dim": 32}, *sites, gate_site=Site(0, "residual"))


def llava_next_gated(folder: Path) -> None:
    """Images in tiles, on Mistral."""
    family_gated(folder, "llava_next", {"head_dim": 32}, Site(1, "ffn"), gate_site=Site(0, "residual"))


def mistral3_gated(folder: Path) -> None:
    """Images of any size."""
    family_gated(folder, "mistral3", {"head_dim": 32}, Site(1, "ffn"), gate_site=Site(0, "residual"))


def phi3_gated(folder: Path) -> None:
    """A language model that is not among those that vLLM's own classes are known of."""
    model, tokenizer = language_model(Phi3ForCausalLM, Phi3Config), build_tokenizer()
    end, prompts = tokenizer.convert_tokens_to_ids(["?", "<assistant>"]), text_prompts()
    repaired = gated(model, tokenizer, prompts, end, Site(1, "ffn"), Site(2, "residual"), gate_site=Site(0, "ffn"))
    write(folder, "phi3-gated", repaired, tokenizer, prompts)


def merged(model: PreTrainedModel, beta: float, *layers: int) -> CareForConditionalGeneration:
    """An affine repair of FFNs; linear if `beta` is 0."""
    draw = torch.Generator().manual_seed(5)
    sites = {}
    for layer in layers:
        found = random_subspace(hidden_size(model), 4, draw, scale=2.0)
        sites[Site(layer, "ffn")] = {"text": Subspace(found.basis, found.mean, beta)}
    return CareForConditionalGeneration.from_base(model, SafetySubspaces(sites, fusion="constant"))


def load_hub_named(folder: Path) -> tuple[PreTrainedModel, Any]:
    """The testbed as the Hub has LLaVA: transformers 5 saves CLIP's tower by names that vLLM does not know."""
    plain = folder / "llava-hub-names"
    shutil.copytree(DATA / "seed0", plain, dirs_exist_ok=True)
    tensors = load_file(plain / "model.safetensors")
    names = {name: name.replace("vision_tower.", "vision_tower.vision_model.", 1) for name in tensors}
    save_file({names[name]: t for name, t in tensors.items()}, plain / "model.safetensors", {"format": "pt"})
    return LlavaForConditionalGeneration.from_pretrained(plain, dtype=torch.float32).eval(), load_testbed(0)[1]


def merges(folder: Path) -> None:
    """Ordinary checkpoints, for vLLM without this package's classes."""
    tokenizer, prompts = build_tokenizer(), text_prompts()
    repaired = merged(language_model(LlamaForCausalLM, LlamaConfig), 1.0, 1, 2)
    write(folder, "llama-merged", repaired, tokenizer, prompts, merge=True)
    repaired = merged(language_model(Qwen2ForCausalLM, Qwen2Config), 0.0, 1, 2)
    write(folder, "qwen2-merged", repaired, tokenizer, prompts, merge=True)
    model, processor = load_hub_named(folder)
    repaired = merged(model, 1.0, 2, 3)
    write(folder, "llava-merged", repaired, processor, world_prompts(folder, processor), merge=True)


BUILDERS: tuple[Callable[[Path], None], ...] = (
    world_gated,
    world_printed,
    world_routed,
    llama_gated,
    qwen_vl_gated,
    llava_gated,
    llava_next_gated,
    mistral3_gated,
    gemma3_gated,
    phi3_gated,
    merges,
)


if __name__ == "__main__":
    for builder in BUILDERS:
        if len(sys.argv) < 3 or builder.__name__ in sys.argv[2:]:
            builder(Path(sys.argv[1]))
