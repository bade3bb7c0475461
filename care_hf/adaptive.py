"""What an attacker who knows a repair puts into the loss beside the target: the repair's own measure of harm."""

import contextlib
from collections.abc import Iterator

import torch

from .attacks import Penalty
from .gating import prompt_ends
from .modeling_care import CareForConditionalGeneration
from .samples import Batch

SLACK = 0.1  # so far below its threshold a gate's score need not fall further


@contextlib.contextmanager
def repair_penalty(model) -> Iterator[Penalty | None]:
    """While entered, gives the penalty of `attacks.pgd` against `model`; None if it is none that is repaired now.

    With a gate: by how much its score exceeds its threshold, at least ``-SLACK``; what is required and the loudest
    alarm must both be above theirs. Without: the squared norm of the correction, mean over prompt tokens and sum over
    sites, which is the projection-aware ``|U^T (h - mean)|^2``.
    """
    if not isinstance(model, CareForConditionalGeneration) or not model.care_state.enabled:
        yield None
    elif model.gate is not None and model.gate.readers.shape[1]:
        read: list[torch.Tensor] = []  # what the gate reads, which at a repaired site is not what the site puts out

        def note(module, args, output) -> None:
            read[:] = args[:1]

        hook = model.gate_reader.register_forward_hook(note)
        try:
            yield lambda batch: _gate_margin(model, read[0], batch)
        finally:
            hook.remove()
    else:
        corrections: dict[int, torch.Tensor] = {}

        def keep(module, args, output) -> None:
            corrections[id(module)] = (output - args[0]).float().square().sum(dim=-1)

        hooks = [module.register_forward_hook(keep) for module in model.care_modules().values()]
        try:
            yield lambda batch: _correction(corrections, batch)
        finally:
            for hook in hooks:
                hook.remove()


def _gate_margin(model, h: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(B,) by h (B, S, d); every attacked prompt has an image, which decides by which alarms it is judged."""
    reader = model.gate_reader
    # The last one: earlier turns of a conversation end like the prompt.
    ends = prompt_ends(batch.inputs["input_ids"], model.gate.prompt_end)
    ends = ends.shape[1] - 1 - ends.int().flip(1).argmax(dim=1)
    margins = reader.margins(h[torch.arange(len(h), device=h.device), ends.to(h.device)])
    required, alarms = margins[:, : reader.required], margins[:, reader.required :]
    alarms = alarms[:, -reader.pictured :] if reader.pictured else alarms
    scores = torch.cat([required, alarms.max(dim=1, keepdim=True).values] if alarms.shape[1] else [required], dim=1)
    return scores.min(dim=1).values.clamp(min=-SLACK)


def _correction(corrections: dict[int, torch.Tensor], batch: Batch) -> torch.Tensor:
    prompt = (batch.visual | batch.text).float()
    means = [
        (squared.reshape(prompt.shape) * prompt.to(squared.device)).sum(dim=1).to(prompt.device)
        for squared in corrections.values()
    ]
    return sum(means) / prompt.sum(dim=1)
