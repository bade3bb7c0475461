"""How far a repair moves activations, and what its gate decides, recorded while a model runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from .modeling_care import CareForConditionalGeneration
from .sites import decoder_layers, output_tensor


@dataclass(frozen=True)
class Decision:
    """What the gate decided at the end of a prompt.

    Attributes:
        fires: whether the answer is repaired.
        required: by how much the score of each detector that must agree exceeds its threshold.
        alarms: the same of the detectors of which one is enough: those for prompts with an image where there is one
            and the gate has such, else those for all.
    """

    fires: bool
    required: tuple[float, ...]
    alarms: tuple[float, ...]


class Correction:
    """What was recorded: one prompt and its answer, forward by forward.

    Attributes:
        decision: of the latest prompt; None if no gate was asked, as where the prompt has no end that it knows.
    """

    def __init__(self):
        self.decision: Decision | None = None
        self._forwards: list[
            torch.Tensor
        ] = []  # of each, the strengths (S,) of its tokens, so far the most of all sites

    def begin(self, length: int) -> None:
        """Note that a forward of so many tokens begins."""
        self._forwards.append(torch.zeros(length, dtype=torch.float64))

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Note what a site made of h (S, d), any dtype."""
        h, moved = before.double(), (after.double() - before.double()).norm(dim=-1)
        # Nothing moved is 0 even where the activation is 0.
        strength = torch.where(moved > 0, moved / h.norm(dim=-1), 0.0).cpu()
        self._forwards[-1] = torch.maximum(self._forwards[-1], strength)

    def strengths(self, length: int) -> list[float]:
        """Of the first `length` tokens, in order.

        Raises:
            RuntimeError: the forwards were of other tokens, as in a search by beams.
        """
        forwards = self._forwards
        if sum(map(len, forwards)) == length:
            return torch.cat(forwards).tolist()
        if forwards and len(forwards[-1]) == length:  # without a cache every forward is of all tokens
            return forwards[-1].tolist()
        raise RuntimeError(
            f"{length} tokens were read in forwards of {[len(forward) for forward in forwards]}, so what was done to "
            "each cannot be told; generate greedily or by sampling, one answer at a time."
        )


@contextmanager
def recorded(repaired: CareForConditionalGeneration) -> Iterator[Correction]:
    """Record what the repair does to one prompt, not padded, and its answer, while entered.

    The strength of a token is ``|h' - h| / |h|``, h what a repaired module put out for it and h' what it passed on
    instead, in the model's own precision, the largest over all sites: 0 where nothing was changed.
    """
    correction, handles = Correction(), []
    last = [len(decoder_layers(repaired))]

    def entered_layer(index: int, args: tuple, kwargs: dict) -> None:
        # A layer no later than the last one begins a forward; some families leave out layers, the first one maybe.
        if index <= last[0]:
            correction.begin((args[0] if args else kwargs["hidden_states"]).shape[-2])
        last[0] = index

    for index, layer in enumerate(decoder_layers(repaired)):
        hook = partial(lambda index, _, args, kwargs: entered_layer(index, args, kwargs), index)
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def watch(module: torch.nn.Module) -> None:
        entered: list[torch.Tensor] = []
        handles.append(module.care.register_forward_pre_hook(lambda _, args: entered.append(args[0].detach())))

        def left(_, args, output):
            if entered:  # not while the repair is off
                h = entered.pop()
                correction.add(h.reshape(-1, h.shape[-1]), output_tensor(output).detach().reshape(-1, h.shape[-1]))

        handles.append(module.register_forward_hook(left))

    for module in repaired._site_modules().values():
        watch(module)
    if repaired.gate_reader is not None:
        handles.append(repaired.gate_reader.register_forward_hook(lambda *asked: _note(correction, *asked)))
    try:
        yield correction
    finally:
        for handle in handles:
            handle.remove()


def _note(correction: Correction, reader: torch.nn.Module, args: tuple, fires: torch.Tensor) -> None:
    h, pictured, ends = args
    places = ends[0].nonzero()[:, 0]
    if not len(places):
        return
    place = int(places[-1])
    margins = reader.margins(h[0, place]).tolist()
    required, own = reader.required, reader.pictured
    alarms = margins[required : len(margins) - own]
    if own and pictured[0, place]:
        alarms = margins[len(margins) - own :]
    correction.decision = Decision(bool(fires[0, place]), tuple(margins[:required]), tuple(alarms))
