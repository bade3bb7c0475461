"""One perturbation for many prompts: a white-box attack on all their images at once, by gradient through the repair.

Where `attacks.pgd` asks whether some image gets past a defence, `universal` asks whether one change of any image does,
for prompts that it was not made on, too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from .attack_steps import Climbed, Search, climb
from .attacks import (
    Penalty,
    check_budget,
    frozen,
    losses_and_penalties,
    noise_generator,
    one_image_prompts,
    with_pixels,
)
from .samples import Sample, batches, load_image
from .teacher_forcing import TargetBatch, encode


@dataclass(frozen=True, eq=False)
class UniversalAttack:
    """A perturbation, and what it does to the prompts that it was made on.

    Attributes:
        delta: int16 (3, H, W), grey levels to add to any image of this size; an image saturates where it would leave
            [0, 255].
        eps: radius of the L-infinity ball that `delta` lies in, in grey levels of 255.
        samples: the prompts, attacked, in order; the images are RGB.
        losses: (restarts, steps + 1), the mean over prompts of ``-log p(target | prompt)`` in nats, on the way.
        penalties: the same of the penalty, unweighted; zeros if there was none.
        best: which of all (restart * (steps + 1) + step) `delta` is.
        at_steps: the same of only the first so many steps of every restart, for the numbers that were asked for.
    """

    delta: torch.Tensor
    eps: float
    samples: list[Sample]
    losses: torch.Tensor
    penalties: torch.Tensor
    best: int
    at_steps: Mapping[int, "UniversalAttack"] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The mean over prompts with `delta`."""
        return self.losses.flatten()[self.best].item()

    def apply(self, samples: Sequence) -> list[Sample]:
        """Other prompts, attacked by the same perturbation.

        Args:
            samples: anything with chat `messages` that hold exactly one image of the perturbation's size.

        Raises:
            ValueError: a prompt without exactly one image, or with one of another size.
        """
        prompts = one_image_prompts(samples)
        _check_sizes(prompts, (self.delta.shape[2], self.delta.shape[1]))
        attacked = [with_pixels(prompt, (_pixels(prompt) + self.delta).clamp(0, 255)) for prompt in prompts]
        check_budget(prompts, attacked, self.eps)
        return attacked


def universal(
    model: nn.Module,
    processor,
    samples: Sequence,
    targets: Sequence[str | Sequence[str]],
    *,
    eps: float,
    steps: int,
    step_size: float | None = None,
    restarts: int = 1,
    optimiser: str = "mi-fgsm",
    momentum: float | None = None,
    keep_steps: Sequence[int] = (),
    penalty: Penalty | None = None,
    weight: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
) -> UniversalAttack:
    """Look for one perturbation within `eps` grey levels that makes `model` answer with the targets of all samples.

    Minimises the mean over samples of ``-log p(target | prompt) + weight * penalty``, each sample's being the mean over
    its targets. Every step is taken on all samples, so that the losses on the way can be compared; their gradients add
    up batch by batch. The model only ever sees 8-bit images. Restart 0 begins without a perturbation, every other one
    at noise that depends on the seed and the restart.

    Targets are of two kinds. A text for each sample, how an answer to it would begin ("PGD-Jailbreak")::

        attack = universal(model, processor, samples, [f"Sure, here is {topic}" for topic in topics], eps=16, steps=100)
        held_out = attack.apply(other_samples)

    or sentences of a corpus, whatever the prompt is ("PGD-Toxic", after Qi et al. 2023, arXiv 2306.13213, who draw
    some sentences at each step where this takes all)::

        attack = universal(model, processor, samples, [sentences] * len(samples), eps=32, steps=100)

    Args:
        model: a vision-language model, repaired or not; run in evaluation mode and given back as it was.
        processor: its processor, with a chat template.
        samples: anything with chat `messages` that hold exactly one image, all of one size.
        targets: of each sample the text that its answer should begin with, or several.
        eps: radius of the L-infinity ball in grey levels of 255.
        steps: gradient steps of each restart.
        step_size: the first step in grey levels; unless told `eps`, and for APGD twice that.
        restarts: how many climbs; the best of all is kept.
        optimiser: one of `attack_steps.OPTIMISERS`, see `attacks.pgd`.
        momentum: of MI-FGSM, how much of the past gradients is kept at each step; 0.5 unless told.
        keep_steps: numbers of steps after which the best so far is kept, too.
        penalty: as `attacks.pgd` takes it; a sample is in one row for each of its targets.
        weight: of the penalty. At 0 it is recorded all the same.
        seed: of the random starts.
        batch_size: how many pairs of a sample and a target run at once; memory only.

    Raises:
        ValueError: no samples, images of several sizes, a sample without targets, and whatever `attacks.pgd` refuses.
    """
    search = Search(eps, steps, restarts, optimiser, step_size, momentum, keep_steps)
    prompts = one_image_prompts(samples, targets)
    if not prompts:
        raise ValueError("`samples` is empty; give the prompts that one perturbation is to serve.")
    _check_sizes(prompts, prompts[0].images[0].size)
    # All are encoded before any work, so that a bad prompt is named now.
    parts = list(_encoded(model, processor, prompts, targets, batch_size))
    with (
        frozen(model),
        torch.enable_grad(),
        logging.tqdm(total=restarts * (steps + 1), desc="Attacking", unit="step", leave=False) as progress,
    ):

        def evaluate(delta, backward):
            progress.update()
            return _evaluate(model, processor, parts, penalty, weight, delta, backward)

        starts = (_start(prompts, eps, seed, restart) for restart in range(restarts))
        climbed = climb(search, starts, *_box(prompts, eps), evaluate, weight)
    result, *at_steps = (_attack(prompts, eps, climbed, kept) for kept in (steps, *keep_steps))
    return replace(result, at_steps=dict(zip(keep_steps, at_steps, strict=True)))


def _encoded(model, processor, prompts, targets, batch_size) -> Iterator[tuple[TargetBatch, torch.Tensor]]:
    """Batches of pairs of a prompt and a target, and each pair's share of the mean, float64 (B,)."""
    pairs = []
    for index, (prompt, texts) in enumerate(zip(prompts, targets, strict=True)):
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError(f"`targets`[{index}] is empty; give a text, or a list of at least one.")
        pairs += [(prompt, text, 1 / (len(texts) * len(prompts))) for text in texts]
    for part in batches(pairs, batch_size):
        some, texts, shares = zip(*part, strict=True)
        yield encode(model, processor, some, texts), torch.tensor(shares, dtype=torch.float64)


def _evaluate(model, processor, parts, penalty, weight, delta, backward):
    """The mean loss and penalty, and the gradient of the objective in `delta`: an `attack_steps.Evaluate`."""
    total, values = torch.zeros_like(delta), torch.zeros(2, 1, dtype=torch.float64)
    for clean, shares in parts:
        shifted = delta.clone().requires_grad_()
        # In float64, so that it hardly matters how the sum over pairs is cut into batches.
        image = (clean.pixels + shifted).clamp(0, 255).float()
        loss, extra = losses_and_penalties(model, processor, clean, image, penalty)
        values[:, 0] += torch.stack([loss, extra]).detach().cpu().double() @ shares
        if backward:  # at once, so that one batch's graph is in memory at a time
            objective = (loss + weight * extra).cpu().double() @ shares
            total += torch.autograd.grad(objective, shifted)[0]
    return values.float(), total if backward else None


def _start(prompts: Sequence[Sample], eps: float, seed: int, restart: int) -> torch.Tensor:
    """No perturbation, or from the second restart uniform noise, float64 (1, 3, H, W)."""
    shape = (1, *_pixels(prompts[0]).shape)
    if restart == 0:
        return torch.zeros(shape, dtype=torch.float64)
    generator = noise_generator(seed, restart, "universal")
    return eps * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)


def _box(prompts: Sequence[Sample], eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and highest perturbation in whole levels, float64 (1, 3, H, W).

    It ends where every image has saturated: beyond, no gradient would lead back.
    """
    darkest = brightest = _pixels(prompts[0])
    for prompt in prompts[1:]:
        pixels = _pixels(prompt)
        darkest, brightest = torch.minimum(darkest, pixels), torch.maximum(brightest, pixels)
    low, high = (-brightest).clamp_min(-floor(eps)), (255 - darkest).clamp_max(floor(eps))
    return low[None].double(), high[None].double()


def _attack(prompts: Sequence[Sample], eps: float, climbed: Climbed, kept: int) -> UniversalAttack:
    """What was found in the first `kept` steps."""
    delta = climbed.found[kept][0].to(torch.int16)
    losses, penalties = (curve[:, : kept + 1, 0] for curve in (climbed.losses, climbed.penalties))
    attack = UniversalAttack(delta, eps, [], losses, penalties, int(climbed.best[kept]))
    return replace(attack, samples=attack.apply(prompts))


def _pixels(prompt: Sample) -> torch.Tensor:
    """Of the one image, int16 (3, H, W)."""
    return torch.from_numpy(np.array(load_image(prompt.images[0]), dtype=np.int16)).permute(2, 0, 1)


def _check_sizes(prompts: Sequence[Sample], size: tuple[int, int]) -> None:
    for index, prompt in enumerate(prompts):
        if prompt.images[0].size != size:
            (width, height), (needed, tall) = prompt.images[0].size, size
            raise ValueError(
                f"`samples`[{index}] has an image of {width} x {height}; one perturbation is for images of one size, "
                f"here {needed} x {tall}. Resize the images, or attack each size by itself."
            )
