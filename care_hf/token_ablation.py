"""How probable an answer is when single tokens of its prompt say nothing of their own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature

import torch
from torch import nn
from transformers.utils import logging

from .devices import input_device
from .interventions import rewritten
from .samples import Batch
from .sites import Site, decoder_layers


@torch.no_grad()
def ablated_log_probabilities(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    chosen: torch.Tensor,
    batch: Batch,
    positions: torch.Tensor,
    site: Site | None,
    batch_size: int = 32,
) -> torch.Tensor:
    """``log p(answer | prompt)``, then the same with each of `positions` ablated; float32 or wider (1 + n,), CPU.

    Ablated, a token's activation is the mean of those of the prompt's other tokens of its modality; of all its other
    tokens, control tokens among them, if there is none; 0, if there is none either.

    Args:
        model: in evaluation mode.
        inputs: of the one prompt and its answer, S columns, without padding, from `samples.answered`.
        chosen: int64 (a,), the answer's token ids, those in the last columns.
        batch: the prompt alone, from `samples.collate`.
        positions: int64 (n,), text or image tokens.
        site: where; None for what enters the first layer.
        batch_size: copies of the prompt per forward.
    """
    columns, length = inputs["input_ids"].shape[1], len(batch.visual[0])
    prompt = torch.arange(columns) < length
    kinds = torch.zeros(columns, dtype=torch.int64)  # 1 text, 2 visual
    kinds[:length] = batch.text[0] + 2 * batch.visual[0]
    ablated = torch.zeros(len(positions) + 1, columns, dtype=torch.bool)  # row 0 is the whole prompt
    ablated[torch.arange(1, len(ablated)), positions] = True
    # Only the answer's logits: those of a long prompt in many copies would not fit into memory.
    options = {"use_cache": False}
    if "logits_to_keep" in signature(getattr(model, "vlm", model).forward).parameters:
        options["logits_to_keep"] = len(chosen) + 1
    found = []
    for start in logging.tqdm(range(0, len(ablated), batch_size), desc="Ablating tokens", leave=False):
        rows = ablated[start : start + batch_size]
        copies = {k: v.repeat(len(rows), *[1] * (v.ndim - 1)).to(input_device(model)) for k, v in inputs.items()}
        with _replacing(model, site, rows, _weights(rows, kinds, prompt)):
            logits = model(**copies, **options).logits[:, -len(chosen) - 1 : -1]
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        found.append(log_p.gather(-1, chosen.to(log_p.device).expand(len(rows), -1)[..., None])[..., 0].sum(1).cpu())
    return torch.cat(found)


def _weights(rows: torch.Tensor, kinds: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """What each token adds to the replacement of the ablated one, float64 (rows, S), each row of sum 1 or 0."""
    kind = (rows * kinds).sum(dim=1, keepdim=True)
    same, other = (kinds == kind) & ~rows, prompt & ~rows
    used = torch.where(same.any(dim=1, keepdim=True), same, other).double()
    return used / used.sum(dim=1, keepdim=True).clamp(min=1)


def _replacing(model: nn.Module, site: Site | None, rows: torch.Tensor, weights: torch.Tensor):
    def rewrite(h: torch.Tensor, stream: torch.Tensor | None = None) -> torch.Tensor:
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        means = torch.einsum("bs,bsd->bd", weights.to(wide), wide)
        return torch.where(rows.to(h.device)[..., None], means[:, None].to(h.dtype), h)

    return _rewritten_input(model, rewrite) if site is None else rewritten(model, site, rewrite)


@contextmanager
def _rewritten_input(model: nn.Module, rewrite) -> Iterator[None]:
    def change_input(module, args, kwargs):
        if args:
            return (rewrite(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": rewrite(kwargs["hidden_states"])}

    handle = decoder_layers(model)[0].register_forward_pre_hook(change_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
