"""Which tokens of a prompt belong to which of its images, and how they lie on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from PIL import Image


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """One image of a prompt and its tokens.

    Attributes:
        image: RGB, cropped, padded and scaled as the model sees it where that can be told, else as given; None where it
            was not kept.
        indices: int64 (n,), which of the scored tokens are the image's, row by row; empty where that cannot be told.
        grid: rows and columns of these tokens, or None where that cannot be told.
    """

    image: Image.Image | None
    indices: torch.Tensor
    grid: tuple[int, int] | None


def image_grids(
    images: Sequence[Image.Image],
    inputs: Mapping[str, torch.Tensor],
    visual: torch.Tensor,
    scored: torch.Tensor,
    config: Any,
    image_processor: Any,
    grids: Sequence[tuple[int, int]] | None = None,
    each: Sequence[int] | None = None,
) -> list[ImageGrid]:
    """Part the image tokens of one prompt among its images.

    Where the inputs have `image_grid_thw` (Qwen), it tells all. Else `each` does, if those are all. Else each run of
    image tokens is an image, or, if there are not as many runs as images and no `each`, all have equally many. An image
    that enters the model as one picture in one run whose length is a square number is taken to be a square of tokens;
    any other layout (tiles, row breaks) is not guessed.

    Args:
        images: of the prompt, in order.
        inputs: of the prompt alone, as from `samples.collate`.
        visual: bool (S,), the image tokens.
        scored: int64 (n,), ascending positions of tokens, all image tokens among them; `indices` are into it.
        config: the model's configuration.
        image_processor: the processor's.
        grids: (rows, columns) of tokens of each image, if the caller knows better.
        each: how many tokens each image has, where it is known.

    Raises:
        ValueError: `grids` are not as many as the images, or do not have as many tokens.
    """
    positions = visual.nonzero()[:, 0]
    counts, shapes = _from_sizes(inputs, len(positions), len(images), config)
    pictures = _single_pictures(inputs, len(images))
    if counts is None:
        fits = each is not None and sum(each) == len(positions)
        counts = list(each) if fits else _from_runs(positions, len(images), equally=each is None)
        shapes = [None] * len(images)
        if counts is not None and pictures is not None:
            shapes = [_square(own) for own in positions.split(counts)]
    if grids is not None:
        shapes = _checked(grids, counts, len(positions), len(images))
        counts = [rows * columns for rows, columns in shapes]
    parts = positions.split(counts) if counts is not None else [positions[:0]] * len(images)
    shown = [_seen(image_processor, image, pictures, index) for index, image in enumerate(images)]
    return [
        ImageGrid(image, torch.searchsorted(scored, part), shape)
        for image, part, shape in zip(shown, parts, shapes, strict=True)
    ]


def _from_sizes(inputs, total: int, images: int, config) -> tuple[list[int] | None, list]:
    """Tokens and shapes by `image_grid_thw`, which counts patches before the vision tower merges them."""
    sizes = inputs.get("image_grid_thw")
    if sizes is None or len(sizes) != images:
        return None, []
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
    merged = [(frames, height // merge, width // merge) for frames, height, width in sizes.tolist()]
    counts = [frames * rows * columns for frames, rows, columns in merged]
    if sum(counts) != total:
        return None, []
    return counts, [(rows, columns) if frames == 1 else None for frames, rows, columns in merged]


def _from_runs(positions: torch.Tensor, images: int, equally: bool) -> list[int] | None:
    """Tokens of each image by where image tokens follow one another; `equally` many where that does not tell."""
    total = len(positions)
    if not total:
        return [0] * images
    ends = [*((positions.diff() > 1).nonzero()[:, 0] + 1).tolist(), total]
    if len(ends) == images:
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    if not equally or not images or total % images:
        return None
    share = total // images
    cuts = set(range(share, total + 1, share))
    # Equal shares that end within a run, while runs end elsewhere, would be of images of different sizes.
    return [share] * images if cuts <= set(ends) or cuts >= set(ends) else None


def _single_pictures(inputs, images: int) -> torch.Tensor | None:
    """The pixel values, (images, 3, H, W), if each image enters the model as one picture of the same size."""
    pixels = inputs.get("pixel_values")
    plain = pixels is not None and pixels.ndim == 4 and len(pixels) == images and "image_sizes" not in inputs
    return pixels if plain else None


def _square(positions: torch.Tensor) -> tuple[int, int] | None:
    side = isqrt(len(positions))
    whole = side > 0 and side * side == len(positions) and int(positions[-1] - positions[0]) == len(positions) - 1
    return (side, side) if whole else None


def _checked(grids, counts: list[int] | None, total: int, images: int) -> list[tuple[int, int]]:
    shapes = [tuple(grid) for grid in grids]
    asked = "give (rows, columns) of tokens, one pair for each image"
    if len(shapes) != images or not all(len(shape) == 2 and min(shape) > 0 for shape in shapes):
        raise ValueError(f"grids={list(grids)!r}, but the prompt has {images} images; {asked}.")
    given = [rows * columns for rows, columns in shapes]
    if given != counts if counts is not None else sum(given) != total:
        known = total if counts is None else counts
        raise ValueError(f"grids={list(grids)!r} have {given} tokens, but the images have {known}; {asked}.")
    return shapes


def _seen(image_processor, image: Image.Image, pictures: torch.Tensor | None, index: int) -> Image.Image:
    """The image that its pixel values came from: what was cropped away has no tokens, so heat must not lie on it."""
    does = image_processor
    normalises = getattr(does, "do_normalize", False)
    mean, std = getattr(does, "image_mean", None), getattr(does, "image_std", None)
    if pictures is None or pictures.shape[1] != 3 or (normalises and (mean is None or std is None)):
        return image
    pixels = pictures[index].detach().float().cpu()
    if normalises:
        pixels = pixels * pixels.new_tensor(std).view(-1, 1, 1) + pixels.new_tensor(mean).view(-1, 1, 1)
    if getattr(does, "do_rescale", False):
        pixels = pixels / does.rescale_factor
    return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())
