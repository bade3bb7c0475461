"""Rivals with a frame of their own, on a plain transformers model: refusal fine-tuning, and ASTRA's steering.

A repair is worth its complexity only where it beats the two things that people would do instead: fine-tune on refusals
(after VLGuard), or steer activations along an adversarial direction (after ASTRA, arXiv 2411.16721).
"""

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from .answers import generate_answers
from .devices import input_device
from .patches import ask_about_image, attribute_patches, keep_patches, patch_count, sequence_logit, with_image
from .samples import IGNORED, Sample, answered, batches, collate
from .sites import Site, decoder_layers, hidden_size, output_tensor, record, replace_output, site_module

# Refusal fine-tuning


def train_refusal_lora(
    model,
    processor,
    refused: Sequence[tuple],
    benign: Sequence[tuple],
    *,
    steps: int,
    rank: int,
    lr: float,
    batch_size: int = 32,
    seed: int = 0,
):
    """Fine-tune LoRA adapters to refuse and, half of every batch, to go on answering: post-hoc, after VLGuard.

    The adapters sit on every linear layer of the decoder, scaled by 2 (alpha = 2 x rank); the loss is the
    cross-entropy of the answer tokens; AdamW with warm-up and cosine decay. The same seed gives the same weights.

    Args:
        model: a vision-language model; it stays as it is, and the adapters go onto a copy of it: merging adds to the
            weights in place, which a copy that shared them would pass on.
        processor: its processor.
        refused: pairs of a harmful prompt (anything with chat `messages`) and the refusal to give.
        benign: pairs of a benign prompt and its answer, as a rule the model's own (`answers.generate_answers`).
        steps: optimiser steps.
        rank: of the adapters.
        lr: peak learning rate.
        batch_size: prompts per step, an even number.
        seed: of the adapters' initial values and of the order of the prompts.

    Returns:
        The `peft.PeftModel`, in the mode (training or evaluation) of `model`.

    Raises:
        ImportError: peft is not installed.
        ValueError: one of the two sets is empty, or `batch_size` is odd.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("Refusal fine-tuning needs peft; install it with `pip install peft`.") from error
    if not refused or not benign:
        raise ValueError("`refused` and `benign` need at least one pair each: half of every batch is from either.")
    if batch_size < 2 or batch_size % 2:
        raise ValueError(f"batch_size={batch_size} must be even: half of every batch is refused, half benign.")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_linear_names(model))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuned = peft.get_peft_model(copy.deepcopy(model), config).train()
        draws = [_endlessly(pairs, batch_size // 2) for pairs in (refused, benign)]
        _optimise(tuned, processor, draws, steps, lr)
    return tuned.train(model.training)


def _optimise(tuned, processor, draws: list[Iterator[list]], steps: int, lr: float) -> None:
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimiser, num_warmup_steps=steps // 10, num_training_steps=steps)
    progress = logging.tqdm(range(steps), desc="Fine-tuning on refusals", unit="step", leave=False)
    for _ in progress:
        samples, answers = zip(*(pair for draw in draws for pair in next(draw)), strict=True)
        inputs, labels = answered(processor, samples, answers)
        inputs = {name: value.to(tuned.device) for name, value in inputs.items()}
        loss = tuned(**inputs, labels=labels.to(tuned.device)).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def _endlessly(pairs: Sequence[tuple], count: int) -> Iterator[list]:
    """Draw `count` pairs at a time, each pair once before any comes again."""
    waiting: list[int] = []
    while True:
        while len(waiting) < count:
            waiting += torch.randperm(len(pairs)).tolist()
        yield [pairs[i] for i in waiting[:count]]
        waiting = waiting[count:]


def _linear_names(model: nn.Module) -> list[str]:
    inside = {id(m) for m in decoder_layers(model).modules() if isinstance(m, nn.Linear)}
    return [name for name, module in model.named_modules() if id(module) in inside]


# ASTRA


class AstraSteering:
    """While entered, steers the last position of every forward away from `vector`, each row by its own activation.

    ``h <- h - alpha * clamp(cos(h - h0, v), 0, 1) * |h| * v / |v|``, norms per token, in float32. The last position is
    the last column: rows of different lengths are padded on the left, as to generate.

    Args:
        model: a vision-language model, steered in place.
        site: a site of the residual stream.
        vector: v (d,), for example from `astra_vector`.
        h0: (d,), for example from `astra_calibration`.
        alpha: how far; the paper's 5 to 10. 0 leaves the model as it is.
        active: called at every forward, returns a bool tensor (B,): the rows to steer. None: all.

    Raises:
        ValueError: the site is not residual or not there; v or h0 is not finite or of another size; v is 0.
    """

    def __init__(
        self,
        model: nn.Module,
        site: Site,
        vector: torch.Tensor,
        h0: torch.Tensor,
        alpha: float,
        active: Callable[[], torch.Tensor] | None = None,
    ):
        if site.component != "residual":
            raise ValueError(f"Site {site}: ASTRA steers the residual stream; use the component 'residual'.")
        for name, value in (("vector", vector), ("h0", h0)):
            if value.shape != (hidden_size(model),) or not torch.isfinite(value).all():
                raise ValueError(f"`{name}` must be finite and of shape ({hidden_size(model)},); got {value.shape}.")
        if not vector.any():
            raise ValueError("`vector` is 0: it has no direction to steer along.")
        self.module = site_module(model, site)
        self.unit, self.h0 = F.normalize(vector.double(), dim=0).float(), h0.float()
        self.alpha, self.active = alpha, active
        self._handle = None

    def __enter__(self) -> "AstraSteering":
        if self._handle is not None:
            raise RuntimeError("This steering is on already; leave it before entering it again.")
        self._handle = self.module.register_forward_hook(self._steer)
        return self

    def __exit__(self, *_) -> None:
        self._handle.remove()
        self._handle = None

    def _steer(self, module: nn.Module, args, output):
        h = output_tensor(output)
        last = h[:, -1].float()
        unit, h0 = self.unit.to(h.device), self.h0.to(h.device)
        cosine = F.cosine_similarity(last - h0, unit, dim=-1).clamp(0, 1)[:, None]
        steered = (last - self.alpha * cosine * torch.linalg.vector_norm(last, dim=-1, keepdim=True) * unit).to(h.dtype)
        if self.active is not None:
            active = self.active().to(h.device)
            if active.shape != h.shape[:1] or active.dtype != torch.bool:
                raise ValueError(f"`active` must give bool ({h.shape[0]},); got {active.dtype} {tuple(active.shape)}.")
            steered = torch.where(active[:, None], steered, h[:, -1])
        return replace_output(output, torch.cat([h[:, :-1], steered[:, None]], dim=1))


def astra_vector(
    model,
    processor,
    pictured_attacks: Sequence,
    site: Site,
    *,
    target: str = "Sure, ",
    patch_size: int | None = None,
    masks: int = 64,
    keep: float = 0.5,
    penalty: float = 0.01,
    top: int = 15,
    text: str | None = "",
    batch_size: int = 32,
    seed: int = 0,
) -> torch.Tensor:
    """Mean of h(image) - h(image without the patches that make the model comply), at the last prompt token.

    Args:
        model: a vision-language model.
        processor: its processor.
        pictured_attacks: attacks (anything with chat `messages`) with one image each, of the size that the model sees:
            patches are of the image as given.
        site: where h is read.
        target: how an answer that complies begins.
        patch_size: side of a patch in pixels; by default the processor's own.
        masks: random masks per attack, from which patches are attributed.
        keep: probability that a mask keeps a patch.
        penalty: of the Lasso.
        top: at most so many patches of an image are attributed.
        text: what stands beside the image where h is read; None: the attack's own text.
        batch_size: images per forward.
        seed: of the masks.

    Returns:
        float32 (d,), not normalised.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: an attack has no image or several; the patch size is unknown; no patch of any image was attributed.
    """
    if patch_size is None and not getattr(processor, "patch_size", None):
        raise ValueError(f"{type(processor).__name__} names no patch size; pass `patch_size=`.")
    patch_size = patch_size or processor.patch_size
    rng = np.random.default_rng(seed)
    whole, without = [], []
    for index, attack in enumerate(logging.tqdm(pictured_attacks, desc="Attributing patches", leave=False)):
        sample = Sample(attack.messages)
        if len(sample.images) != 1:
            raise ValueError(f"`pictured_attacks`[{index}] has {len(sample.images)} images; it needs one.")
        image = sample.images[0]
        kept = rng.random((masks, patch_count(image, patch_size))) < keep
        masked = [with_image(sample, keep_patches(image, mask, patch_size)) for mask in kept]
        responses = sequence_logit(model, processor, masked, target, batch_size)
        remaining = np.ones(kept.shape[1], dtype=bool)
        remaining[attribute_patches(kept, responses.numpy(), penalty, top)] = False
        if not remaining.all():  # an image without attributed patches differs from itself by 0
            read = sample if text is None else ask_about_image(sample, text)
            whole.append(read)
            without.append(with_image(read, keep_patches(image, remaining, patch_size)))
    if not whole:
        raise ValueError("No patch of any image makes the target more likely; there is no direction to steer along.")
    difference = [_last_token(model, processor, s, site, batch_size) for s in (whole, without)]
    return ((difference[0] - difference[1]).sum(dim=0) / len(pictured_attacks)).float()


def astra_calibration(
    model,
    processor,
    benign: Sequence,
    site: Site,
    *,
    text: str | None = "What is the image about?",
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> torch.Tensor:
    """h0, the mean activation of the tokens that the model answers to benign images, float32 (d,).

    Args:
        model: a vision-language model.
        processor: its processor.
        benign: benign prompts (anything with chat `messages`) with images.
        site: where h is read.
        text: the question about every image; None: the prompts as they are.
        max_new_tokens: how long answers may get.
        batch_size: prompts per forward.

    Raises:
        ValueError: every answer is empty; a prompt has no image to put `text` beside.
    """
    samples = [Sample(s.messages) for s in benign]
    samples = samples if text is None else [ask_about_image(sample, text) for sample in samples]
    answers = generate_answers(model, processor, samples, max_new_tokens, batch_size)
    total, count = torch.zeros(hidden_size(model), dtype=torch.float64), 0
    for part in batches(list(zip(samples, answers, strict=True)), batch_size):
        inputs, labels = answered(processor, *zip(*part, strict=True), end=False)
        h = _activations(model, inputs, site)[labels != IGNORED]
        total, count = total + h.sum(dim=0), count + len(h)
    if not count:
        raise ValueError("Every answer is empty, so that there is no token to calibrate on.")
    return (total / count).float()


def _last_token(model, processor, samples: Sequence[Sample], site: Site, batch_size: int) -> torch.Tensor:
    """Activations of the last prompt token, float64 (N, d)."""
    rows = []
    for part in batches(samples, batch_size):
        inputs = collate(processor, part, (), padding_side="right").inputs
        last = inputs["attention_mask"].sum(dim=1) - 1
        rows.append(_activations(model, inputs, site)[torch.arange(len(part)), last])
    return torch.cat(rows)


@torch.no_grad()
def _activations(model, inputs: dict[str, torch.Tensor], site: Site) -> torch.Tensor:
    with record(model, [site]) as activations:
        model(**{name: value.to(input_device(model)) for name, value in inputs.items()})
    return activations[site].cpu().double()
