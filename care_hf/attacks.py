"""White-box attacks on the image of a prompt, by gradient through the processor's preprocessing, the model, its repair.

A defence that stands against fixed prompts may only be in their way: `pgd` looks for the image, within a few grey
levels of the original, that makes the model as it is passed say a given text.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import cos, pi

import torch
from PIL import Image
from torch import nn
from transformers.utils import logging

from .samples import Batch, Sample, batches
from .teacher_forcing import TargetBatch, encode, target_losses

Penalty = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Attacked:
    """What an attack found. Restart 0 begins at the clean image, so that ``losses[0, 0]`` is the undisturbed model's.

    Attributes:
        samples: the prompts with the best image of each, in order; the images are RGB.
        losses: (restarts, steps + 1, n), ``-log p(target | prompt)`` in nats of every image on the way, as 8 bits.
        penalties: the same of the penalty, unweighted; zeros if there was none.
        best: int64 (n,), which image of all (restart * (steps + 1) + step) was returned.
    """

    samples: list[Sample]
    losses: torch.Tensor
    penalties: torch.Tensor
    best: torch.Tensor

    @property
    def images(self) -> list[Image.Image]:
        """The attacked images."""
        return [sample.images[0] for sample in self.samples]

    @property
    def loss(self) -> torch.Tensor:
        """(n,), ``-log p(target | prompt)`` of the returned images."""
        return self.losses.flatten(0, 1).gather(0, self.best[None])[0]

    @property
    def penalty(self) -> torch.Tensor:
        """(n,), the penalty of the returned images."""
        return self.penalties.flatten(0, 1).gather(0, self.best[None])[0]


def pgd(
    model: nn.Module,
    processor,
    samples: Sequence,
    targets: Sequence[str],
    *,
    eps: float,
    steps: int,
    step_size: float | None = None,
    restarts: int = 2,
    momentum: float = 0.5,
    penalty: Penalty | None = None,
    weight: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
) -> Attacked:
    """Look for images within `eps` grey levels of the originals that make `model` answer with `targets`.

    Minimises ``-log p(target | prompt) + weight * penalty`` per sample by sign steps with momentum (MI-FGSM), whose
    size falls as a cosine. The model only ever sees 8-bit images, so that what is reported is what a saved image does;
    the best one seen is returned. Restart 0 begins at the clean image, every other one at noise that depends on the
    seed, the restart and the prompt, not on the prompts beside it.

    A hard gate is differentiated as it stands: its decision has no gradient. `penalty` gives one to its score. It is
    called once after each forward and reads what the caller's own hooks have kept of it::

        with record(model, [site]) as activations:  # care_hf.sites
            pgd(..., penalty=lambda batch: (activations[site] @ probe).masked_fill(~batch.visual, 0).sum(1), weight=0.1)

    Args:
        model: a vision-language model, repaired or not; run in evaluation mode and given back as it was.
        processor: its processor, with a chat template.
        samples: anything with chat `messages` that hold exactly one image.
        targets: the text that each answer should begin with.
        eps: radius of the L-infinity ball in grey levels of 255.
        steps: gradient steps of each restart.
        step_size: the first step in grey levels; `eps` unless told.
        restarts: how many climbs; the best of all is kept.
        momentum: how much of the past gradients is kept at each step, 0 for plain PGD.
        penalty: takes the `Batch` that has just run (right padded; `visual` and `text` tell the prompt's tokens from
            the target's), returns what to keep low, (B,), attached to the forward's graph.
        weight: of the penalty. At 0 it is recorded all the same.
        seed: of the random starts.
        batch_size: how many prompts run at once; memory only.

    Raises:
        ValueError: a prompt without exactly one image, an image that the processor does not merely crop, rescale and
            normalise, a chat template that does not continue a prompt with its answer, a target without tokens, a
            setting out of range, a penalty of another shape, or a loss that is not finite.
    """
    if not 0 <= eps <= 255:
        raise ValueError(f"eps={eps} must be in grey levels, from 0 to 255.")
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps={steps} and restarts={restarts} must be at least 1.")
    if len(samples) != len(targets):
        raise ValueError(f"There are {len(samples)} samples and {len(targets)} targets; give one target per sample.")
    prompts = [Sample(sample.messages) for sample in samples]
    parts = [part for indices in _by_image_size(prompts) for part in batches(indices, batch_size)]
    # All are encoded before any work, so that a bad prompt is named now.
    encoded = [encode(model, processor, [prompts[i] for i in part], [targets[i] for i in part]) for part in parts]

    settings = {"eps": eps, "steps": steps, "step_size": eps if step_size is None else step_size, "momentum": momentum}
    climb = partial(_climb, model, processor, penalty=penalty, weight=weight, **settings)
    losses = torch.zeros(restarts, steps + 1, len(prompts))
    penalties, best = torch.zeros_like(losses), torch.zeros(len(prompts), dtype=torch.int64)
    with _frozen(model), torch.enable_grad():
        for i in logging.tqdm(range(len(parts)), desc="Attacking", unit="batch", leave=False):
            part, clean = parts[i], encoded[i]
            starts = (_start(clean, eps, seed, restart) for restart in range(restarts))
            visited = (step for start in starts for step in climb(clean, start))
            pixels, curves, best[part] = _best(clean, visited, weight)
            losses[:, :, part], penalties[:, :, part] = curves.unflatten(1, (restarts, steps + 1))
            if (pixels.int() - clean.pixels.int()).abs().max() > eps:
                raise ValueError(f"An attacked image is more than eps={eps} grey levels from its original: a bug.")
            for index, image in zip(part, pixels, strict=True):
                prompts[index] = _with_image(prompts[index], image)
    return Attacked(prompts, losses, penalties, best)


def _start(clean: TargetBatch, eps: float, seed: int, restart: int) -> torch.Tensor:
    """The clean images, or from the second restart uniform noise around them; each prompt has its own stream of it."""
    original = clean.pixels.float()
    if restart == 0:
        return original
    noise = []
    for digest in clean.digests:
        stream = int.from_bytes(hashlib.sha256(f"{seed} {restart} {digest}".encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(stream)
        noise.append(2 * torch.rand(original.shape[1:], generator=generator) - 1)
    return original + eps * torch.stack(noise)


def _climb(
    model, processor, clean: TargetBatch, point: torch.Tensor, *, eps, steps, step_size, momentum, penalty, weight
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield every image on the way (uint8) with its losses and penalties (2, B), steps + 1 times."""
    original, velocity = clean.pixels.float(), torch.zeros_like(point)
    # Whole grey levels, so that rounding never leaves the ball.
    low, high = (original - eps).clamp_min(0).ceil(), (original + eps).clamp_max(255).floor()
    point = point.clamp(low, high)
    for step in range(steps + 1):
        # The gradient is taken at the image that can be saved; the steps add up between grey levels.
        image = point.round().requires_grad_()
        loss = target_losses(model, processor, clean, image)
        extra = torch.zeros_like(loss) if penalty is None else penalty(clean.batch).to(loss.device)
        if extra.shape != loss.shape:
            raise ValueError(f"The penalty has the shape {tuple(extra.shape)}; it must be one value per sample, (B,).")
        yield image.detach().to(torch.uint8), torch.stack([loss, extra]).detach().cpu().float()
        if step < steps:
            (gradient,) = torch.autograd.grad((loss + weight * extra).sum(), image)
            scale = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
            velocity = momentum * velocity + gradient / scale
            size = step_size * (1 + cos(pi * step / steps)) / 2
            point = (point - size * velocity.sign()).clamp(low, high)


def _best(clean: TargetBatch, visited: Iterable[tuple[torch.Tensor, torch.Tensor]], weight: float):
    """The best image visited of each prompt (uint8), all losses and penalties (2, visited, B), and which was best."""
    found, lowest = clean.pixels.clone(), torch.full((len(clean.pixels),), torch.inf)
    best, curves = torch.zeros(len(found), dtype=torch.int64), []
    for index, (image, values) in enumerate(visited):
        objective = values[0] + weight * values[1]
        if not objective.isfinite().all():
            raise ValueError(f"The loss of image {index} on the way is not finite; run the model in a wider dtype.")
        better = objective < lowest
        found[better], lowest[better], best[better] = image[better], objective[better], index
        curves.append(values)
    return found, torch.stack(curves, 1), best


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients of parameters, for a while."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def _by_image_size(prompts: Sequence[Sample]) -> list[list[int]]:
    sizes: dict[tuple[int, int], list[int]] = {}
    for index, prompt in enumerate(prompts):
        if len(prompt.images) != 1:
            raise ValueError(
                f"`samples`[{index}] has {len(prompt.images)} images; an attack on the image needs exactly one."
            )
        sizes.setdefault(prompt.images[0].size, []).append(index)
    return list(sizes.values())


def _with_image(prompt: Sample, pixels: torch.Tensor) -> Sample:
    """The same prompt with another image."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    def replace(part):
        return {**part, "image": image} if part["type"] == "image" else part

    return Sample([{**m, "content": [replace(part) for part in m["content"]]} for m in prompt.messages])
