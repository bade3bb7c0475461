"""What is measured of one model that is defended somehow: answers, distance from the base, time, gradient attacks."""

import base64
import contextlib
import io
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from .adaptive import repair_penalty
from .answers import generate_answers, next_token_log_probabilities, relative_entropy
from .attacks import pgd
from .patches import with_image
from .samples import Sample
from .suite import Case
from .universal_attack import universal

ROUNDS = 5  # of answers to one batch, for latency


def divergence(base: torch.Tensor, defended: torch.Tensor) -> float:
    """Mean over prompts of KL(base || defended) of the next token, in nats, from log-probabilities (n, vocabulary)."""
    return relative_entropy(base, defended).mean().item()


def next_tokens(model: nn.Module, processor, cases: Sequence[Case], batch_size: int) -> torch.Tensor | None:
    """Log-probabilities (n, vocabulary) of the first token of the answers; None of a model that only generates."""
    if getattr(model, "generates_only", False):
        return None
    return next_token_log_probabilities(model, processor, cases, batch_size)


def latency(
    base: Callable[[], AbstractContextManager[nn.Module]],
    defended: Callable[[], AbstractContextManager[nn.Module]],
    processor,
    cases: Sequence[Case],
    max_new_tokens: int,
) -> dict[str, Any]:
    """Seconds that both take to answer one batch, side by side; medians of `ROUNDS`, after one that does not count.

    Both are entered for each answer alone, since a defence may sit on the base itself; that takes no counted time.
    """
    seconds: dict[str, list[float]] = {"base": [], "defended": []}
    for _ in range(1 + ROUNDS):
        for name, entered in (("base", base), ("defended", defended)):
            with entered() as model:
                start = time.perf_counter()
                generate_answers(model, processor, cases, max_new_tokens, len(cases))
                seconds[name].append(time.perf_counter() - start)
    medians = {name: sorted(times[1:])[ROUNDS // 2] for name, times in seconds.items()}
    return {**medians, "ratio": medians["defended"] / medians["base"], "batch": len(cases)}


def gradient_attack(
    model: nn.Module, processor, cases: Sequence[Case], *, weight: float, seed: int, **settings: Any
) -> dict[str, Any]:
    """Attack the images of `cases` through `model`, and have it answer.

    Args:
        model: attacked as it stands, its repair included.
        processor: its processor.
        cases: with one image and a target each.
        weight: of the repair's own penalty in the loss.
        seed: of random starts.
        settings: of `attacks.pgd`.

    Returns:
        Plain values: "images" (PNG, base64) by number of steps, all of them last, the "loss" and "penalty" of each, and
        the mean "curve" over steps, the best of all restarts.
    """
    targets = [case.target for case in cases]
    with repair_penalty(model) as penalty:
        attacked = pgd(
            model, processor, cases, targets, penalty=penalty, weight=weight if penalty else 0.0, seed=seed, **settings
        )
    return {
        "images": {
            str(steps): [_png(image) for image in found.images]
            for steps, found in {**attacked.at_steps, settings["steps"]: attacked}.items()
        },
        "loss": attacked.loss.tolist(),
        "penalty": attacked.penalty.tolist(),
        "curve": attacked.losses.min(dim=0).values.mean(dim=1).tolist(),
    }


def universal_attack(
    model: nn.Module,
    processor,
    made_on: Sequence[Case],
    tried_on: Sequence[Case],
    targets: Sequence[str],
    *,
    weight: float,
    seed: int,
    **settings: Any,
) -> dict[str, Any]:
    """Make one perturbation for all images of `made_on`, and put it on those of `tried_on`.

    Arguments and result as in `gradient_attack`; `targets` are sentences, each for every prompt.
    """
    with repair_penalty(model) as penalty:
        weight = weight if penalty else 0.0
        wanted = [list(targets)] * len(made_on)
        found = universal(model, processor, made_on, wanted, penalty=penalty, weight=weight, seed=seed, **settings)
    return {
        "images": {str(settings["steps"]): [_png(sample.images[0]) for sample in found.apply(tried_on)]},
        "loss": found.loss,
        "curve": found.losses.min(dim=0).values.tolist(),
    }


def with_images(cases: Sequence[Case], images: Sequence[str]) -> list[Case]:
    """The cases with the images of `gradient_attack`."""
    return [
        replace(case, messages=with_image(Sample(case.messages), _image(image)).messages)
        for case, image in zip(cases, images, strict=True)
    ]


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _image(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def has_penalty(model: nn.Module) -> bool:
    """Whether an adaptive attack on `model` has more to lower than its loss."""
    with contextlib.ExitStack() as stack:
        return stack.enter_context(repair_penalty(model)) is not None
