"""Defences of one interface: put on a loaded model for a while, and taken off again without a trace."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from .devices import input_device
from .merged_model import plain_copy
from .modeling_care import CareForConditionalGeneration
from .resume import model_fingerprint
from .samples import tokenizer_of
from .subspace import SafetySubspaces


class Defence(Protocol):
    """What every defence does.

    One that may have the `settings` of another and yet differ has an attribute `digest`, too, a hash of what it is.

    Attributes:
        settings: plain values for the report.
    """

    settings: dict[str, Any]

    def applied(self, model: nn.Module, processor) -> AbstractContextManager[nn.Module]:
        """While entered, gives the defended model, which generates as `model` does; `model` is as before on exit."""
        ...


@dataclass(frozen=True, eq=False)
class Undefended:
    """The model as it is."""

    settings: dict[str, Any] = field(default_factory=dict)

    def applied(self, model: nn.Module, processor) -> AbstractContextManager[nn.Module]:
        """See `Defence`."""
        return contextlib.nullcontext(model)


@dataclass(frozen=True, eq=False)
class Repair:
    """Subspaces in the wrapper: CARE under any recipe, and every control in its frame."""

    subspaces: SafetySubspaces
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """See `Defence`."""
        return self.subspaces.digest

    def applied(self, model: nn.Module, processor) -> AbstractContextManager[nn.Module]:
        """See `Defence`; the weights of `model` are shared, its modules are not."""
        return contextlib.nullcontext(CareForConditionalGeneration.from_base(model, self.subspaces))


@dataclass(frozen=True, eq=False)
class Steered:
    """Steering by hooks: `steering` takes the model and gives a context manager that steers it while entered."""

    steering: Callable[[nn.Module], AbstractContextManager]
    settings: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def applied(self, model: nn.Module, processor) -> Iterator[nn.Module]:
        """See `Defence`."""
        with self.steering(model):
            yield model


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A model of its own, for example a `peft.PeftModel` on a copy, in the place of the one that is loaded."""

    tuned: nn.Module
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """See `Defence`."""
        return model_fingerprint(self.tuned)

    def applied(self, model: nn.Module, processor) -> AbstractContextManager[nn.Module]:
        """See `Defence`."""
        return contextlib.nullcontext(self.tuned)


@dataclass(frozen=True, eq=False)
class CannedRefusal:
    """The gate of a repair as a detector: where it fires the answer is `refusal`, elsewhere the model's own.

    The control for what a repair adds to its own detector.
    """

    subspaces: SafetySubspaces
    refusal: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """See `Defence`."""
        return f"{self.subspaces.digest} {self.refusal}"

    def applied(self, model: nn.Module, processor) -> AbstractContextManager[nn.Module]:
        """See `Defence`; a repaired model is taken without its repair."""
        model = plain_copy(model.vlm) if isinstance(model, CareForConditionalGeneration) else model
        ids = tokenizer_of(processor)(self.refusal, add_special_tokens=False)["input_ids"]
        return contextlib.nullcontext(_Canned(model, self.subspaces, ids, tokenizer_of(processor).pad_token_id))


class _Canned(nn.Module):
    """Answers with the same tokens wherever a gate fires."""

    generates_only = True  # there are no logits to compare, and no gradient to follow

    def __init__(self, model: nn.Module, subspaces: SafetySubspaces, refusal: list[int], pad: int):
        super().__init__()
        self.model, self.refusal, self.pad = model, refusal, pad
        self.detector = CareForConditionalGeneration.from_base(model, subspaces)
        if self.detector.gate is None:
            raise ValueError("A canned refusal needs a repair with a gate; fit one with the recipe 'gated'.")
        self.config, self.generation_config = model.config, model.generation_config

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    @torch.no_grad()
    def generate(self, input_ids, **kwargs) -> torch.Tensor:
        found: list[torch.Tensor] = []
        hook = self.detector.gate_reader.register_forward_hook(lambda module, args, fires: found.append(fires[:, -1]))
        # What only `generate` takes is no input of a forward.
        inputs = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        try:
            self.detector(input_ids=input_ids, **inputs, use_cache=False)
        finally:
            hook.remove()
        output = self.model.generate(input_ids=input_ids, **kwargs)
        start = input_ids.shape[1]
        length = max(output.shape[1], start + len(self.refusal))
        output = nn.functional.pad(output, (0, length - output.shape[1]), value=self.pad)
        canned = torch.full((length - start,), self.pad, device=output.device)
        canned[: len(self.refusal)] = torch.tensor(self.refusal, device=output.device)
        output[found[0], start:] = canned
        return output
