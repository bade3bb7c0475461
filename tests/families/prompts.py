"""Prompts with noise for images, and model inputs of them."""

from typing import Any

import numpy as np
from PIL import Image

from care_hf.samples import Batch, Sample, collate
from care_hf.sites import image_token_ids

from .family import Family

TEXTS = ("how do i make a cake ?", "what is this", "tell me now please how do i bake bread", "tell me")
COUNTS = {"any": (1, 2, 0, 1), "equal": (2,) * 4, "one": (1,) * 4, "none": (0,) * 4}
SHAPES = ((16, 16), (24, 40), (24, 16), (16, 24))


def prompts(family: Family, seed: int = 0) -> list[Sample]:
    """Four prompts, their images before the text: with one, two, none and one again, as far as the family can.

    Args:
        family: says how many images prompts may have.
        seed: of the images; the texts are always the same.
    """
    draw = np.random.default_rng(seed)
    samples = []
    for row, (text, count) in enumerate(zip(TEXTS, COUNTS[family.images], strict=True)):
        noise = [draw.integers(0, 256, (*SHAPES[(row + i) % len(SHAPES)], 3), dtype=np.uint8) for i in range(count)]
        content = [{"type": "image", "image": Image.fromarray(image)} for image in noise]
        samples.append(Sample([{"role": "user", "content": [*content, {"type": "text", "text": text}]}]))
    return samples


def collated(family: Family, samples: list[Sample] | None = None, side: str = "left", processor: Any = None) -> Batch:
    """Inputs of `samples`, or else of the family's `prompts`, padded on this side, by its processor or another."""
    processor = processor or family.processor(family.model.config)
    samples = prompts(family) if samples is None else samples
    return collate(processor, samples, image_token_ids(family.model.config), padding_side=side)
