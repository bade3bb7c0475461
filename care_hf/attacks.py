"""White-box attacks on the image of a prompt, by gradient through the processor's preprocessing, the model, its repair.

A defence that stands against fixed prompts may only be in their way: `pgd` looks for the image, within a few grey
levels of the original, that makes the model as it is passed say a given text. `universal_attack` looks for one
perturbation that does so for many prompts.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.utils import logging

from .attack_steps import Climbed, Search, climb
from .patches import with_image
from .samples import Batch, Sample, batches, load_image
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
        at_steps: the same of only the first so many steps of every restart, for the numbers that were asked for.
    """

    samples: list[Sample]
    losses: torch.Tensor
    penalties: torch.Tensor
    best: torch.Tensor
    at_steps: Mapping[int, "Attacked"] = field(default_factory=dict)

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
    optimiser: str = "mi-fgsm",
    momentum: float | None = None,
    keep_steps: Sequence[int] = (),
    penalty: Penalty | None = None,
    weight: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
) -> Attacked:
    """Look for images within `eps` grey levels of the originals that make `model` answer with `targets`.

    Minimises ``-log p(target | prompt) + weight * penalty`` per sample. The model only ever sees 8-bit images, so that
    what is reported is what a saved image does; the best one seen is returned. Restart 0 begins at the clean image,
    every other one at noise that depends on the seed, the restart and the prompt, not on the prompts beside it.

    `optimiser` is "mi-fgsm" (sign steps with momentum, whose size falls as a cosine), "pgd" (the same without
    momentum) or "apgd" (each prompt halves its own step size when it gets nowhere; see `attack_steps.AutoSteps`).

    One run gives the success against steps. All optimisers plan ahead for `steps`, so that what is kept on the way is
    the best so far of a longer run, which a run of so few steps need not find::

        attacked = pgd(..., steps=40, keep_steps=(5, 10, 20, 40))
        attacked.at_steps[10].samples  # after 10 steps of every restart

    A hard gate is differentiated as it stands: its decision has no gradient. `penalty` gives one to its score. It is
    called once after each forward and reads what the caller's own hooks have kept of it::

        with record(model, [site]) as activations:  # care_hf.sites
            pgd(..., penalty=lambda batch: (activations[site] @ probe).masked_fill(~batch.visual, 0).sum(1), weight=0.1)

    Transfer to a model that cannot be differentiated is the attacked samples of one that can, put to it::

        attacked = pgd(surrogate, processor, samples, targets, eps=16, steps=40)
        answers = generate_answers(black_box, its_processor, attacked.samples, 32)  # care_hf.answers

    Args:
        model: a vision-language model, repaired or not; run in evaluation mode and given back as it was.
        processor: its processor, with a chat template.
        samples: anything with chat `messages` that hold exactly one image.
        targets: the text that each answer should begin with.
        eps: radius of the L-infinity ball in grey levels of 255.
        steps: gradient steps of each restart.
        step_size: the first step in grey levels; unless told `eps`, and for APGD twice that.
        restarts: how many climbs; the best of all is kept.
        optimiser: one of `attack_steps.OPTIMISERS`.
        momentum: of MI-FGSM, how much of the past gradients is kept at each step; 0.5 unless told.
        keep_steps: numbers of steps after which the best so far is kept, too.
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
    search = Search(eps, steps, restarts, optimiser, step_size, momentum, keep_steps)
    prompts = one_image_prompts(samples, targets)
    several = next((i for i, target in enumerate(targets) if not isinstance(target, str)), None)
    if several is not None:
        raise ValueError(f"`targets`[{several}] is no text; several targets are for `universal_attack.universal`.")
    parts = [part for indices in _by_image_size(prompts) for part in batches(indices, batch_size)]
    # All are encoded before any work, so that a bad prompt is named now.
    encoded = [encode(model, processor, [prompts[i] for i in part], [targets[i] for i in part]) for part in parts]

    climbed = []
    with frozen(model), torch.enable_grad():
        for i in logging.tqdm(range(len(parts)), desc="Attacking", unit="batch", leave=False):
            evaluate = partial(_evaluate, model, processor, encoded[i], penalty, weight)
            climbed.append(_climb(search, encoded[i], evaluate, weight, seed))
    result, *at_steps = (_attacked(search, prompts, parts, climbed, kept) for kept in (steps, *keep_steps))
    for found in (result, *at_steps):
        check_budget(prompts, found.samples, eps)
    return replace(result, at_steps=dict(zip(keep_steps, at_steps, strict=True)))


def check_budget(originals: Sequence, attacked: Sequence, eps: float) -> None:
    """Refuse attacked images that are not 8-bit RGB, of the size of their originals and within `eps` grey levels.

    Args:
        originals: anything with chat `messages`, images as PIL images inside them.
        attacked: the same prompts with attacked images.
        eps: radius of the L-infinity ball in grey levels of 255.

    Raises:
        ValueError: an image that is not, naming its sample and how far it is from its original.
    """
    if len(originals) != len(attacked):
        raise ValueError(f"There are {len(originals)} originals and {len(attacked)} attacked samples; give pairs.")
    for index, pair in enumerate(zip(originals, attacked, strict=True)):
        before, after = (Sample(sample.messages).images for sample in pair)
        if len(before) != len(after):
            raise ValueError(f"`attacked`[{index}] has {len(after)} images, its original {len(before)}.")
        for clean, image in zip(before, after, strict=True):
            if image.mode != "RGB" or image.size != clean.size:
                raise ValueError(
                    f"`attacked`[{index}] is a {image.mode} image of {image.width} x {image.height}; it must be 8-bit "
                    f"RGB of {clean.width} x {clean.height}, as its original."
                )
            distance = np.abs(np.subtract(image, load_image(clean), dtype=np.int16)).max()
            if distance > eps:
                raise ValueError(
                    f"`attacked`[{index}] is {distance} grey levels from its original, more than eps={eps}; an attack "
                    "has to stay within its budget, on the 8-bit image that is saved."
                )


def one_image_prompts(samples: Sequence, targets: Sequence | None = None) -> list[Sample]:
    """The prompts alone.

    Raises:
        ValueError: one has no image or several, or there is another number of targets.
    """
    if targets is not None and len(samples) != len(targets):
        raise ValueError(f"There are {len(samples)} samples and {len(targets)} targets; give one target per sample.")
    prompts = [Sample(sample.messages) for sample in samples]
    for index, prompt in enumerate(prompts):
        if len(prompt.images) != 1:
            raise ValueError(
                f"`samples`[{index}] has {len(prompt.images)} images; an attack on the image needs exactly one."
            )
    return prompts


def losses_and_penalties(
    model: nn.Module, processor, clean: TargetBatch, image: torch.Tensor, penalty: Penalty | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``-log p(target | prompt)`` (B,) with the images `image` (B, 3, H, W) in [0, 255], and the penalty (B,) or 0.

    Raises:
        ValueError: the penalty has another shape; or there should be a gradient, and the model has none.
    """
    loss = target_losses(model, processor, clean, image)
    if image.requires_grad and torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            f"{type(model).__name__} has no gradient from what it says to its pixels, as where images become tokens of "
            "a vocabulary (Chameleon), so its images cannot be attacked by gradient; leave out pictured cases and "
            "sentences to force, or set `gradient_cases` and `universal_cases` of the budget to 0."
        )
    extra = torch.zeros_like(loss) if penalty is None else penalty(clean.batch).to(loss.device)
    if extra.shape != loss.shape:
        raise ValueError(f"The penalty has the shape {tuple(extra.shape)}; it must be one value per sample, (B,).")
    return loss, extra


def with_pixels(prompt: Sample, pixels: torch.Tensor) -> Sample:
    """The same prompt with another image: whole grey levels (3, H, W) from 0 to 255."""
    return with_image(prompt, Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()))


def noise_generator(*names) -> torch.Generator:
    """The random numbers that belong to these names."""
    digest = hashlib.sha256(" ".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
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


def _climb(search: Search, clean: TargetBatch, evaluate, weight: float, seed: int) -> Climbed:
    """Attack a batch."""
    original = clean.pixels.float()
    # Whole grey levels, so that rounding never leaves the ball.
    low, high = (original - search.eps).clamp_min(0).ceil(), (original + search.eps).clamp_max(255).floor()
    starts = (_start(clean, search.eps, seed, restart) for restart in range(search.restarts))
    return climb(search, starts, low, high, evaluate, weight)


def _start(clean: TargetBatch, eps: float, seed: int, restart: int) -> torch.Tensor:
    """The clean images, or from the second restart uniform noise around them; each prompt has its own stream of it."""
    original = clean.pixels.float()
    if restart == 0:
        return original
    generators = (noise_generator(seed, restart, digest) for digest in clean.digests)
    noise = [2 * torch.rand(original.shape[1:], generator=generator) - 1 for generator in generators]
    return original + eps * torch.stack(noise)


def _evaluate(model, processor, clean, penalty, weight, image, backward):
    """Losses and penalties of images, and the gradient of the objective in them: an `attack_steps.Evaluate`."""
    image = image.requires_grad_()
    loss, extra = losses_and_penalties(model, processor, clean, image, penalty)
    gradient = torch.autograd.grad((loss + weight * extra).sum(), image)[0] if backward else None
    return torch.stack([loss, extra]).detach().cpu().float(), gradient


def _attacked(search: Search, prompts: Sequence[Sample], parts, climbed: Sequence[Climbed], kept: int) -> Attacked:
    """What all batches together found in their first `kept` steps."""
    samples, best = list(prompts), torch.zeros(len(prompts), dtype=torch.int64)
    curves = torch.zeros(2, search.restarts, kept + 1, len(prompts))
    for part, found in zip(parts, climbed, strict=True):
        best[part] = found.best[kept]
        curves[..., part] = torch.stack([found.losses, found.penalties])[:, :, : kept + 1]
        for index, image in zip(part, found.found[kept], strict=True):
            samples[index] = with_pixels(prompts[index], image)
    return Attacked(samples, *curves, best)


def _by_image_size(prompts: Sequence[Sample]) -> list[list[int]]:
    sizes: dict[tuple[int, int], list[int]] = {}
    for index, prompt in enumerate(prompts):
        sizes.setdefault(prompt.images[0].size, []).append(index)
    return list(sizes.values())
