"""How probable a target text is after prompts with images, differentiable down to the pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from .devices import input_device
from .processor_quirks import IGNORED, mark_answers
from .samples import Batch, Sample, chat, collate, load_image
from .sites import image_token_ids

TOLERANCE = 1e-4  # of pixel values, whose grey levels lie about 0.01 apart


@dataclass(frozen=True, eq=False)
class TargetBatch:
    """Prompts of one image size, each followed by its target text.

    Attributes:
        batch: padded on the right, without pixel values; `visual` and `text` are False at the target's tokens.
        labels: int64 (B, S), the target's tokens at their own columns, -100 elsewhere.
        pixels: uint8 (B, 3, H, W), the clean images.
        digests: the `Sample.digest` of every prompt.
    """

    batch: Batch
    labels: torch.Tensor
    pixels: torch.Tensor
    digests: list[str]


def differentiable_pixel_values(processor, pixels: torch.Tensor) -> torch.Tensor:
    """What the processor makes of `pixels` (B, 3, H, W) in [0, 255], if it only crops, rescales and normalises."""
    does = processor.image_processor
    if getattr(does, "do_center_crop", False):
        height, width = does.crop_size["height"], does.crop_size["width"]
        top, left = ((have - want) // 2 for have, want in zip(pixels.shape[-2:], (height, width), strict=True))
        pixels = pixels[..., max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    if getattr(does, "do_rescale", False):
        pixels = pixels * does.rescale_factor
    if getattr(does, "do_normalize", False):
        mean, std = (pixels.new_tensor(value).view(-1, 1, 1) for value in (does.image_mean, does.image_std))
        pixels = (pixels - mean) / std
    return pixels


def encode(model: nn.Module, processor, prompts: Sequence[Sample], targets: Sequence[str]) -> TargetBatch:
    """Tokenise prompts and targets, and check that `differentiable_pixel_values` is what the processor does to them.

    Args:
        model: whose device and image tokens are used.
        processor: its processor.
        prompts: each with one image, all images of one size.
        targets: the text that follows each prompt.

    Raises:
        ValueError: the chat template or the image processor does something else.
    """
    prompt = collate(processor, prompts, image_token_ids(model.config), padding_side="right")
    answers = [{"role": "assistant", "content": [{"type": "text", "text": target}]} for target in targets]
    # Prompt and answer are tokenised as one text: that is what the model was trained on.
    turns = [[*sample.messages, answer] for sample, answer in zip(prompts, answers, strict=True)]
    inputs = chat(processor, turns, "right", continue_final_message=True)
    ids, before = inputs["input_ids"], prompt.inputs["input_ids"]
    starts, ends = (mask.sum(1) for mask in (prompt.inputs["attention_mask"], inputs["attention_mask"]))
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if start >= end or not torch.equal(ids[row, :start], before[row, :start]):
            raise ValueError(
                f"With the target {targets[row]!r} the chat template does not write the prompt and then the target, so "
                "the loss would be that of something else; give a target that is not empty, or another template."
            )
    column = torch.arange(ids.shape[1])
    labels = torch.where((column >= starts[:, None]) & (column < ends[:, None]), ids, IGNORED)
    mark_answers(processor, inputs, labels)
    pixels = torch.stack([torch.from_numpy(np.array(load_image(s.images[0]))).permute(2, 0, 1) for s in prompts])
    _check_preprocessing(processor, pixels, inputs.get("pixel_values", torch.empty(0)))
    added = ids.shape[1] - before.shape[1]
    masks = (nn.functional.pad(mask, (0, added)).to(input_device(model)) for mask in (prompt.visual, prompt.text))
    tokens = {name: value.to(input_device(model)) for name, value in inputs.items() if name != "pixel_values"}
    return TargetBatch(Batch(tokens, *masks), labels, pixels, [sample.digest for sample in prompts])


def target_losses(model: nn.Module, processor, clean: TargetBatch, pixels: torch.Tensor) -> torch.Tensor:
    """``-log p(target | prompt)`` (B,) with the images `pixels` (B, 3, H, W) in [0, 255], by teacher forcing."""
    values = differentiable_pixel_values(processor, pixels).to(input_device(model))
    logits = model(**clean.batch.inputs, pixel_values=values, use_cache=False).logits
    first = int((clean.labels != IGNORED).int().argmax(1).min())  # before it no row has a target
    logits = logits[:, first - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32))
    labels = clean.labels[:, first:].to(logits.device)
    return nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none").sum(1)


def _check_preprocessing(processor, pixels: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse a processor that does more than `differentiable_pixel_values` to these images, or to noise of their size.

    Noise, because a resized picture of one colour is a cropped one.
    """
    noise = np.random.default_rng(0).integers(0, 256, (*pixels.shape[-2:], 3), dtype=np.uint8)
    of_noise = processor.image_processor([Image.fromarray(noise)], return_tensors="pt")["pixel_values"]
    for clean, theirs in ((pixels, expected), (torch.from_numpy(noise).permute(2, 0, 1)[None], of_noise)):
        ours = differentiable_pixel_values(processor, clean.float())
        error = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else torch.inf
        if error > TOLERANCE:
            height, width = pixels.shape[-2:]
            raise ValueError(
                f"{type(processor.image_processor).__name__} does more to images of {width} x {height} than crop, "
                f"rescale and normalise (pixel values differ by {error:.2g}), so that an attack would be on other "
                "pixels; give images of the size that the model takes. Other preprocessing is not supported."
            )
