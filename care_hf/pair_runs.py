"""Refused and jailbroken prompts side by side, and what changes when one gets activations of the other."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .devices import input_device
from .interventions import entered_at, layer_calls, rewritten
from .samples import IGNORED, Sample, answered
from .sites import Site, record, visual_token_ids

logger = logging.get_logger(__name__)
GROUPS = ("image", "prompt", "last", "generated")
TOLERANCE = 1e-3  # of log-probabilities, in nats: how far a forward that begins at a layer may be from a whole one


class PairRuns:
    """Pairs of prompts, each with both forced texts: rows (refused, jailbroken) x (refusal, complying answer) x n.

    Args:
        model: in evaluation mode.
        processor: its processor.
        refused: n prompts with chat `messages`.
        jailbroken: n others.
        refusals: the text that refuses, for each pair.
        complied: the text that complies.
        sites: that may be patched.
    """

    def __init__(self, model: nn.Module, processor, refused, jailbroken, refusals, complied, sites: Sequence[Site]):
        self.model, self.sites, self.n = model, list(sites), len(refused)
        prompts = [Sample(case.messages) for case in [*refused, *refused, *jailbroken, *jailbroken]]
        # Without an end of sequence: answers may have been cut off, and their ends are none.
        inputs, labels = answered(processor, prompts, [*refusals, *complied] * 2, end=False)
        self.inputs = {name: value.to(input_device(model)) for name, value in inputs.items()}
        self.labels = labels.to(input_device(model))
        self.groups = token_groups(self.inputs, self.labels, visual_token_ids(model.config))
        self._recorded: dict[Site, torch.Tensor] | None = None
        self._entered: int | None = None  # the layer that `_skips` is about: whether forwards may begin there
        self._skips = False

    @torch.no_grad()
    def patched(self, site: Site | None) -> dict[str, dict[str, list[float | None]]]:
        """Outcomes of both runs (None), or the effects of patching `site`, by group of tokens."""
        if self._recorded is None:
            self._record()
        refused, jailbroken = self._base
        if site is None:
            return {"": {"refused": refused.tolist(), "jailbroken": jailbroken.tolist()}}
        if site.layer != self._entered:
            self._entered, self._skips = site.layer, site.layer > 0 and self._enters(site.layer)
        results = {}
        for group in GROUPS:
            index = counterparts(self.groups[group])
            both = (index >= 0).any(dim=1).reshape(4, self.n).all(dim=0).tolist()
            found = self._outcomes(site, index) if any(both) else self._base
            effects = {"indirect": found[1] - jailbroken, "direct": found[0] - jailbroken}
            results[group] = {
                name: [value if there else None for value, there in zip(values.tolist(), both, strict=True)]
                for name, values in effects.items()
            }
        return results

    def _record(self) -> None:
        with record(self.model, self.sites) as activations, layer_calls(self.model) as calls:
            self._log_p = self._log_probabilities()
        self._recorded, self._calls, self._base = dict(activations), calls, self._contrast(self._log_p)

    def _enters(self, layer: int) -> bool:
        """Whether a forward that begins at `layer` gives what a whole one gives.

        Layers may hand on more than the stream (a gate's decision, shared keys), which is then missing, or left over
        from the forward before; so each layer is asked after those before it have been patched.
        """
        try:
            with entered_at(self.model, layer, self._calls):
                again = self._log_probabilities()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # Models differ in how they miss it; an error with another cause comes again in a whole forward.
            logger.info(f"Forwards are whole at layer {layer}: {error!r}")
            return False
        return bool(((again - self._log_p).abs() <= TOLERANCE).all())

    def _outcomes(self, site: Site, index: torch.Tensor) -> torch.Tensor:
        """Y of refused and jailbroken runs, float64 (2, n), each patched from the other at some tokens."""
        known = self._recorded[site]
        index = index.to(known.device)  # a part of the model may be on another device
        group = (index >= 0)[..., None]
        # A column more: the mean over the other run's tokens of the group, for tokens without a counterpart. Half
        # precision would not hold the sum.
        work = known.to(torch.promote_types(known.dtype, torch.float32)).masked_fill(~group, 0)
        mean = work.sum(dim=1, keepdim=True) / group.sum(dim=1, keepdim=True).clamp_min(1)
        source = torch.cat([known, mean.to(known)], dim=1).roll(2 * self.n, dims=0)
        chosen = source.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, known.shape[-1]))

        def rewrite(output, stream):
            return torch.where(group, chosen, output)

        started = entered_at(self.model, site.layer, self._calls) if self._skips else nullcontext()
        with started, rewritten(self.model, site, rewrite):
            return self._contrast(self._log_probabilities())

    def _log_probabilities(self) -> torch.Tensor:
        """Of the forced texts, float64 (4 n,)."""
        logits = self.model(**self.inputs, use_cache=False).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = self.labels[:, 1:].to(logits.device)
        losses = F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
        return -losses.double().sum(dim=1).cpu()

    def _contrast(self, log_p: torch.Tensor) -> torch.Tensor:
        by_text = log_p.reshape(2, 2, self.n)
        return by_text[:, 0] - by_text[:, 1]


def token_groups(inputs, labels: torch.Tensor, image_tokens: Sequence[int]) -> dict[str, torch.Tensor]:
    """Which tokens are of which group of `GROUPS`, bool (B, S) each; every token that is no padding is of one."""
    ids, generated = inputs["input_ids"], labels != IGNORED
    place = torch.arange(ids.shape[1], device=ids.device)
    begins = generated.int().argmax(dim=1, keepdim=True)
    last = place == begins - 1
    image = torch.isin(ids, torch.tensor(list(image_tokens), dtype=ids.dtype, device=ids.device)) & ~generated
    prompt = inputs["attention_mask"].bool() & (place < begins - 1) & ~image
    return {"image": image & ~last, "prompt": prompt, "last": last, "generated": generated}


def counterparts(group: torch.Tensor) -> torch.Tensor:
    """Which column of the other run each token of a group gets, int64 (B, S); -1 where it stays as it is.

    Rows B/2 apart are each other's. Tokens are matched from the last of the group backwards; those that have none left
    get column S, which stands for the mean.
    """
    rows, columns = group.shape
    index = torch.full((rows, columns), -1, dtype=torch.int64, device=group.device)
    for row in range(rows):
        mine, theirs = (group[i].nonzero()[:, 0] for i in (row, (row + rows // 2) % rows))
        if len(mine) and len(theirs):
            index[row, mine] = columns
            count = min(len(mine), len(theirs))
            index[row, mine[-count:]] = theirs[-count:]
    return index
