"""Modules that repair their output: the class swap, and the copy of a model's structure that it is done on."""

import copy
import functools
import inspect
from collections.abc import Callable

import torch
from torch import nn

from .gating import TurnProjection
from .quantised import settle
from .repair_state import Forward
from .sites import output_tensor, replace_output


class CareSiteMixin:
    """Put before a module's own class, it has the output read by `care_gate` and repaired by `care`, where it has them.

    `care` is a `SafetyProjection` or a `TurnProjection`, `care_gate` a `GateReader`; both rest if `care_state` is off.
    """

    def forward(self, *args, **kwargs):
        """The module's own forward, then the gate, then the repair."""
        output = super().forward(*args, **kwargs)
        return output if "forward" in self.__dict__ else self._after(output)

    def __setattr__(self, name, value):
        # Tensor parallelism, accelerate and kernels put a forward of theirs on the module itself, around or in place of
        # that of its class. Only what theirs puts out is whole: before, it may be this process's part of a sum.
        if name == "forward" and getattr(value, "func", None) is not _repaired_forward:
            value = functools.update_wrapper(functools.partial(_repaired_forward, self, value), value)
        super().__setattr__(name, value)

    def _after(self, output):
        if not self.care_state.enabled:
            return output
        h, state = output_tensor(output), self.care_state.now
        if self.care_gate is not None:
            state.decide(self.care_gate, h.reshape(*_known(state.pictured).shape, h.shape[-1]))
        return output if self.care is None else replace_output(output, self._repair(h, state))

    def _repair(self, h: torch.Tensor, state: Forward) -> torch.Tensor:
        def fitting(of_tokens: torch.Tensor | None) -> torch.Tensor | None:
            # Some FFNs work on (B * S, d); a part of the model may be on another device.
            return None if of_tokens is None else of_tokens.to(h.device).reshape(h.shape[:-1])

        if isinstance(self.care, TurnProjection):
            return self.care(h, fitting(_known(state.held_steps)))
        repaired = self.care(h, fitting(state.visual_mask))
        if self.care_scope == "all":
            return repaired
        return torch.where((fitting(_known(state.steps)) <= 0)[..., None], repaired, h)

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so pickle and deepcopy are told how to make it again.
        return _new_site_module, (type(self).__mro__[2],), self.__dict__


def _repaired_forward(module: nn.Module, forward, *args, **kwargs):
    return module._after(forward(*args, **kwargs))


def _known(of_tokens: torch.Tensor | None) -> torch.Tensor:
    """What the gate needs to know of the tokens, or decided of them.

    Raises:
        ValueError: there is no forward of the whole model going on that could tell.
    """
    if of_tokens is None:
        raise ValueError(
            "The gate was not told which tokens it is given; call, compile and enable gradient checkpointing on the "
            "repaired model, not on one of its parts."
        )
    return of_tokens


@functools.cache
def care_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with `CareSiteMixin` before it; weight names stay those of `cls`."""
    return type(
        f"Care{cls.__name__}", (CareSiteMixin, cls), {"__module__": __name__, "__doc__": f"A repaired {cls.__name__}."}
    )


def _new_site_module(cls: type[nn.Module]) -> nn.Module:
    repaired = care_class(cls)
    return repaired.__new__(repaired)


def copy_structure(model: nn.Module) -> nn.Module:
    """A copy of the modules of `model` that shares all of its tensors."""
    shared = [*model.parameters(), *model.buffers(), *settle(model)]
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):  # accelerate's; their weights_map may hold the whole model
            shared += [
                v for v in (getattr(part, "weights_map", None), getattr(part, "tied_params_map", None)) if v is not None
            ]
    return copy.deepcopy(model, {id(value): value for value in shared})


class SignatureOfBase:
    """Decorates the wrapper's `forward`, which passes on what it is given, to say what the base takes.

    By its signature `Trainer` chooses the columns of a data set, and exporters name the inputs. Of an instance it is
    that of its own base; of the class, what all bases have in common.
    """

    def __init__(self, method: Callable):
        self.method = method
        given = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "input_ids")]
        named = inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None)
        others = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
        method.__signature__ = inspect.Signature([given[0], given[1].replace(default=None), named, others])

    def __get__(self, model, owner=None):
        if model is None:
            return self.method
        bound = functools.partial(self.method, model)  # bound methods take no attributes
        if not torch.compiler.is_compiling() and "vlm" in model._modules:
            bound.__signature__ = _signature_bound(type(model.vlm))
        return bound


@functools.cache
def _signature_bound(cls: type[nn.Module]) -> inspect.Signature:
    whole = inspect.signature(cls.forward)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def execution_device(module: nn.Module) -> torch.device:
    """Where `module` runs, offloaded or not."""
    hook = getattr(module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    tensors = [t for t in (*module.parameters(), *module.buffers()) if not t.is_meta]
    return tensors[0].device if tensors else torch.device("cpu")
