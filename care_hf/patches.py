"""Which patches of an image make a model comply: a Lasso on what random masks do to the answer."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .devices import input_device
from .samples import IGNORED, Sample, answered, batches


def patch_count(image: Image.Image, patch_size: int) -> int:
    """Patches in the grid over `image`; those at the right and lower edge may be smaller."""
    return -(-image.width // patch_size) * -(-image.height // patch_size)


def keep_patches(image: Image.Image, kept: np.ndarray, patch_size: int) -> Image.Image:
    """`image` with the other patches "zeroed", that is in the image's mean grey: black would be a drawing of its own.

    Args:
        image: an RGB image.
        kept: bool, one per patch, row by row.
        patch_size: side of a patch in pixels.
    """
    pixels = np.asarray(image.convert("RGB"))
    grid = kept.reshape(-(-image.height // patch_size), -1).repeat(patch_size, 0).repeat(patch_size, 1)
    shown = grid[: image.height, : image.width, None]
    return Image.fromarray(np.where(shown, pixels, np.uint8(round(pixels.mean()))))


def with_image(sample: Sample, image: Image.Image) -> Sample:
    """`sample` with another image in the place of each of its own."""

    def put(part):
        return {"type": "image", "image": image} if part["type"] == "image" else part

    return Sample([{**message, "content": [put(part) for part in message["content"]]} for message in sample.messages])


def ask_about_image(sample: Sample, text: str) -> Sample:
    """A prompt of the first image of `sample` and nothing but `text`.

    Raises:
        ValueError: `sample` has no image.
    """
    if not sample.images:
        raise ValueError("A prompt has no image to ask about; give prompts with images.")
    content = [{"type": "image", "image": sample.images[0]}, {"type": "text", "text": text}]
    return Sample([{"role": "user", "content": content}])


@torch.no_grad()
def sequence_logit(model, processor, samples: Sequence, target: str, batch_size: int = 32) -> torch.Tensor:
    """``log p - log(1 - p)`` of the answers to `samples` beginning with `target`, float64 (N,)."""
    logits = []
    for part in batches(samples, batch_size):
        inputs, labels = answered(processor, part, [target] * len(part), end=False)
        here = labels[:, 1:] != IGNORED
        scores = model(**{name: value.to(input_device(model)) for name, value in inputs.items()}).logits[:, :-1]
        scores, chosen = scores[here.to(scores.device)].cpu().double(), labels[:, 1:][here][:, None]
        others = scores.scatter(-1, chosen, float("-inf")).logsumexp(-1)
        # Through the odds of each token, so that probabilities near 1 keep their differences.
        log_p = -F.softplus(others - scores.gather(-1, chosen)[:, 0]).reshape(len(part), -1).sum(-1)
        logits.append(log_p - torch.log(-torch.expm1(log_p)))
    return torch.cat(logits)


def attribute_patches(kept: np.ndarray, responses: np.ndarray, penalty: float, top: int) -> np.ndarray:
    """Indices of the at most `top` patches that raise the response most, by a Lasso on standardised masks.

    Args:
        kept: bool (masks, patches).
        responses: (masks,).
        penalty: of the Lasso.
        top: how many patches at most.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import Lasso
    except ImportError as error:
        raise ImportError("Attribution needs scikit-learn; install it with `pip install scikit-learn`.") from error
    spread = kept.std(axis=0)
    spread[spread == 0] = 1  # a patch that every mask keeps has no effect to tell
    scaled = (responses - responses.mean()) / (responses.std() or 1)
    fitted = Lasso(alpha=penalty, max_iter=10_000).fit((kept - kept.mean(axis=0)) / spread, scaled)
    effects = fitted.coef_ / spread
    best = np.argsort(-effects, kind="stable")[:top]
    return best[effects[best] > 0]
