"""What the processors of single families do otherwise than others, evened out so that prompts are read as alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import InstructBlipProcessor, MllamaProcessor, PaliGemmaProcessor

IGNORED = -100  # the label that transformers' losses leave out
Conversations = Sequence[Sequence[dict[str, Any]]]
Inputs = dict[str, torch.Tensor]


def prompt_with_what_is_needed(processor) -> list[dict[str, Any]]:
    """A short conversation that `processor` takes, with an image if it must have one."""
    content: list[dict[str, Any]] = [{"type": "text", "text": "?"}]
    if isinstance(processor, (PaliGemmaProcessor, InstructBlipProcessor)):
        content.insert(0, {"type": "image", "image": Image.new("RGB", (64, 64))})
    return [{"role": "user", "content": content}]


def check_images(processor, conversations: Conversations) -> None:
    """Assert that the prompts of a batch have numbers of images with which each is read as if it were alone.

    Raises:
        ValueError: not so.
    """
    counts = [sum(part["type"] == "image" for m in messages for part in m["content"]) for messages in conversations]
    if isinstance(processor, MllamaProcessor) and len(set(counts)) > 1:
        raise ValueError(
            f"The prompts of one batch have {counts} images. {type(processor).__name__} pads them to equal numbers, "
            "and tokens before a prompt's first image attend to the padding, so that prompts would not be read as "
            "alone; give prompts with equal numbers of images (to what takes pairs: within each pair), or batch_size=1."
        )
    if isinstance(processor, InstructBlipProcessor) and set(counts) != {1}:
        raise ValueError(
            f"The prompts of one batch have {counts} images, and {type(processor).__name__} takes exactly one image in "
            "each; leave the other prompts out, or give each its image."
        )


def apply_evenly(processor, conversations: Conversations, apply: Callable[[Conversations], Inputs]) -> Inputs:
    """What `apply`, which calls the processor, gives for `conversations`, each read as it would be alone."""
    if isinstance(processor, PaliGemmaProcessor) and not _pictured(conversations):
        # It takes no batch without an image, though its model does: a prompt with one goes along, and is taken out.
        inputs = dict(apply([*conversations, prompt_with_what_is_needed(processor)]))
        del inputs["pixel_values"]
        rows = {name: value[:-1] for name, value in inputs.items()}
        seen = rows["attention_mask"].bool().any(dim=0)
        return {name: value[:, seen] for name, value in rows.items()}
    inputs = dict(apply(conversations))
    if isinstance(processor, InstructBlipProcessor):
        # Its Q-Former counts positions from the first column, so that padding there would shift them.
        order = inputs["qformer_attention_mask"].argsort(dim=1, descending=True, stable=True)
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            inputs[name] = inputs[name].gather(1, order)
    return inputs


def mark_answers(processor, inputs: Inputs, labels: torch.Tensor) -> None:
    """Have answers, where `labels` are not `IGNORED`, read from left to right; PaliGemma reads prompts both ways."""
    if isinstance(processor, PaliGemmaProcessor):
        inputs["token_type_ids"] = torch.where(labels != IGNORED, 1, inputs["token_type_ids"])


def _pictured(conversations: Conversations) -> bool:
    return any(part["type"] == "image" for messages in conversations for m in messages for part in m["content"])
