"""An "SPO-style" rival: steering vectors that preference optimisation refines while the model stays frozen.

After arXiv 2509.00373, of which there is no public code: this is our reading, and no result of it is a result of the
paper's. Stage I takes one vector per layer from several contrast sets; stage II optimises those vectors, and nothing
else, so that refusals are preferred to the model's own compliance and benign answers are kept. Where the paper scores
sampled answers by rewards, this takes given pairs of answers and the loss of DPO (arXiv 2305.18290).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from .devices import input_device
from .samples import IGNORED, answered, batches
from .sites import hidden_size
from .steering_vectors import SteeringVectors, contrast_vectors


def answer_log_probs(model, processor, samples: Sequence, answers: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """``log pi(answer | prompt)`` (B,), summed over the answer's tokens and the end of sequence, and their number (B,).

    In float32 at least; differentiable in whatever the model's forward is.
    """
    inputs, labels = answered(processor, samples, answers)
    logits = model(**{name: value.to(input_device(model)) for name, value in inputs.items()}, use_cache=False).logits
    first = int((labels != IGNORED).int().argmax(dim=1).min())  # before it no row has an answer
    logits = logits[:, first - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels[:, first:].to(logits.device)
    losses = F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
    return -losses.sum(dim=1), (labels != IGNORED).sum(dim=1)


def preference_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Mean of ``-log sigmoid(beta * [(chosen - its reference) - (rejected - its reference)])``, a scalar.

    The loss of DPO (arXiv 2305.18290, equation 7); arguments are `answer_log_probs` of whole answers, (B,).
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return F.softplus(-beta * margin).mean()


def train_preference_steering(
    model,
    processor,
    harmful: Sequence[tuple],
    benign: Sequence[tuple],
    *,
    layers: Sequence[int],
    steps: int = 150,
    lr: float = 0.03,
    beta: float = 0.1,
    retention: float = 2.0,
    batch_size: int = 32,
    seed: int = 0,
    scale: float = 0.05,
    contrasts: Sequence[tuple[Sequence, Sequence]] | None = None,
) -> SteeringVectors:
    """Train "SPO-style" steering vectors: `contrast_vectors`, then preference optimisation of the vectors alone.

    The loss of a step is `preference_loss` against the unsteered model, plus `retention` times the cross-entropy per
    token of the benign answers. AdamW without weight decay, warm-up and cosine decay. Dropout is off throughout; the
    same seed gives the same vectors. The defaults were chosen on the testbed's validation split, steering all layers.

    Args:
        model: a vision-language model; its weights, their `requires_grad` and its mode are left as they were.
        processor: its processor.
        harmful: triples of a harmful prompt (anything with chat `messages`), the answer to prefer (the refusal) and
            the one not to (as a rule the model's own compliance; a prompt that it refuses already has none).
        benign: pairs of a benign prompt and its answer, as a rule the model's own (`answers.generate_answers`).
        layers: decoder layers whose residual stream is steered, from 0.
        steps: of the optimiser; 0 gives stage I alone.
        lr: peak learning rate, in units of the residual stream's mean root-mean-square at each layer, so that one
            value serves layers and models of any scale: a step moves a vector by at most about this share of the
            stream's norm.
        beta: how sharply preferences count; the smaller, the farther the steered model may go from the base.
        retention: weight of the benign answers.
        batch_size: prompts per step, an even number: half harmful (each with both answers), half benign.
        seed: of the order of the prompts.
        scale: length of the vectors of stage I, see `contrast_vectors`.
        contrasts: contrast sets of stage I; by default the harmful prompts against the benign ones.

    Raises:
        ValueError: a set is empty, two answers of a triple are the same, a setting is out of range, or the loss is no
            longer finite; also as `contrast_vectors`.
    """
    _check(harmful, benign, steps, lr, beta, retention, batch_size)
    settings = {"layers": sorted(layers), "steps": steps, "lr": lr, "beta": beta, "retention": retention}
    settings |= {"batch_size": batch_size, "seed": seed, "scale": scale, "stages": "I and II" if steps else "I"}
    settings |= {"harmful": len(harmful), "benign": len(benign)}
    if contrasts is None:
        contrasts = [([item[0] for item in harmful], [item[0] for item in benign])]
    settings["contrasts"] = [list(map(len, contrast)) for contrast in contrasts]
    with _frozen(model):
        start, norms = contrast_vectors(model, processor, contrasts, layers, scale=scale, batch_size=batch_size)
        steering = SteeringVectors(
            model, {site: v.to(input_device(model)).requires_grad_() for site, v in start.items()}
        )
        rms = {site: norm / math.sqrt(hidden_size(model)) for site, norm in norms.items()}
        groups = [{"params": [vector], "lr": lr * rms[site]} for site, vector in steering.vectors.items()]
        if steps:
            _optimise(model, processor, harmful, benign, steering, groups, settings)
    return SteeringVectors(model, {site: v.detach() for site, v in steering.vectors.items()}, settings)


def _optimise(model, processor, harmful, benign, steering: SteeringVectors, groups: list[dict], settings: dict) -> None:
    steps, half = settings["steps"], settings["batch_size"] // 2
    references = _references(model, processor, harmful, settings["batch_size"])
    generator = torch.Generator().manual_seed(settings["seed"])
    order = zip(*(_order(len(items), steps, half, generator) for items in (harmful, benign)), strict=True)
    optimiser = torch.optim.AdamW(groups, weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimiser, num_warmup_steps=steps // 10, num_training_steps=steps)
    progress = logging.tqdm(order, desc="Optimising preferences", total=steps, unit="step", leave=False)
    for step, (rows, others) in enumerate(progress):
        part, kept = [harmful[i] for i in rows], [benign[i] for i in others]
        with steering:
            loss = _batch_loss(
                model, processor, part, kept, references[:, rows], settings["beta"], settings["retention"]
            )
            if not torch.isfinite(loss):
                raise ValueError(f"At step {step} the loss is {loss.item()}; lower `lr` ({settings['lr']}) or `scale`.")
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def _batch_loss(
    model, processor, harmful: Sequence[tuple], benign: Sequence[tuple], references, beta: float, retention: float
) -> torch.Tensor:
    """The loss of these triples and pairs, a scalar; `references` (2, N) as `_references` gives them."""
    prompts, preferred, dispreferred = zip(*harmful, strict=True)
    kept, answers = zip(*benign, strict=True)
    log_p, lengths = answer_log_probs(
        model, processor, [*prompts, *prompts, *kept], [*preferred, *dispreferred, *answers]
    )
    chosen, rejected, benign_log_p = log_p.split([len(harmful), len(harmful), len(benign)])
    loss = preference_loss(chosen, rejected, *references.to(log_p.device), beta)
    return loss - retention * benign_log_p.sum() / lengths[2 * len(harmful) :].sum()


@torch.no_grad()
def _references(model, processor, harmful: Sequence[tuple], batch_size: int) -> torch.Tensor:
    """`answer_log_probs` of the unsteered model for the preferred and the dispreferred answers, (2, N)."""
    found: tuple[list, list] = ([], [])
    progress = logging.tqdm(total=len(harmful), desc="Scoring answers", unit="prompt", leave=False)
    for part in batches(harmful, batch_size):
        prompts, *pair = zip(*part, strict=True)
        for values, answers in zip(found, pair, strict=True):
            values.append(answer_log_probs(model, processor, prompts, answers)[0].cpu())
        progress.update(len(part))
    progress.close()
    return torch.stack([torch.cat(values) for values in found])


def _order(count: int, steps: int, size: int, generator: torch.Generator) -> list[list[int]]:
    """`size` indices for every step, each index once before any comes again."""
    rounds = -(-steps * size // count)
    indices = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return indices[: steps * size].reshape(steps, size).tolist()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients for the weights; afterwards each as it was."""
    trained = [p for p in model.parameters() if p.requires_grad]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


def _check(harmful, benign, steps, lr, beta, retention, batch_size) -> None:
    if not harmful or not benign:
        raise ValueError("`harmful` and `benign` need at least one item each: half of every batch is from either.")
    for name, items, parts in (
        ("harmful", harmful, ("prompt", "preferred", "dispreferred")),
        ("benign", benign, ("prompt", "answer")),
    ):
        for index, item in enumerate(items):
            if len(item) != len(parts):
                raise ValueError(f"`{name}`[{index}] has {len(item)} parts; expected ({', '.join(parts)}).")
    for index, (_, preferred, dispreferred) in enumerate(harmful):
        if preferred == dispreferred:
            raise ValueError(
                f"`harmful`[{index}]: the answer to prefer and the one not to are both {preferred!r:.80}, so there is "
                "nothing to learn; leave out prompts that the model refuses already."
            )
    if batch_size < 2 or batch_size % 2:
        raise ValueError(f"batch_size={batch_size} must be even: half of every batch is harmful, half benign.")
    for name, value, allowed in (
        ("steps", steps, steps >= 0),
        ("lr", lr, lr > 0),
        ("beta", beta, beta > 0),
        ("retention", retention, retention >= 0),
    ):
        if not (math.isfinite(value) and allowed):
            expected = "0 or more" if name in ("steps", "retention") else "more than 0"
            raise ValueError(f"{name}={value} must be {expected} and finite.")
