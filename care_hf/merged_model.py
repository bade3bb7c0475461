"""A repaired model's base with the repair in its weights, sharing all the tensors that do not change."""

from types import MethodType
from typing import Any

from torch import nn, zeros
from transformers import PreTrainedModel

from .mergeability import Plan
from .repaired_module import CareSiteMixin, copy_structure

OF_THE_REPAIR = ("care", "care_gate", "care_state", "care_scope", "care_whole", "care_places")


def plain_copy(vlm: PreTrainedModel) -> PreTrainedModel:
    """The base in a repaired model as it was before, sharing its tensors."""
    model = copy_structure(vlm)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if _ours(hook)]:
                del hooks[key]
        if isinstance(module, CareSiteMixin):
            _take_off(module)
        for name in OF_THE_REPAIR:
            module._modules.pop(name, None)
            module.__dict__.pop(name, None)
    return model


def _ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(f"{__package__}.")


def _take_off(module: nn.Module) -> None:
    """Give a repaired module its own class again, and its own forward to what accelerate put around it."""
    module.__class__ = type(module).__mro__[2]
    around = module.__dict__.get("forward")
    if around is not None:
        module.forward = around.args[1]
    if "_old_forward" in module.__dict__:
        module._old_forward = MethodType(type(module).forward, module)


def fold(model: PreTrainedModel, plan: Plan) -> tuple[str, ...]:
    """Fold a plan's maps into weights of a `plain_copy`, which are copies then, and give it the plan's biases.

    Returns:
        The names of parameters that changed or are new.
    """
    for flag in plan.flags:
        setattr(model.config.get_text_config(), flag, True)
    touched = set(plan.biases)
    for name, shape in plan.biases.items():
        owner, _, leaf = name.rpartition(".")
        linear = model.get_submodule(owner)
        linear.register_parameter(leaf, nn.Parameter(zeros(shape, dtype=linear.weight.dtype), requires_grad=False))
    for site, mapping in plan.maps.items():
        ends = plan.ends[site]
        for name in ends.linears:
            linear = model.get_submodule(name)
            linear.weight = _frozen(mapping.folded(linear.weight.detach()))
            touched.add(f"{name}.weight")
            if linear.bias is not None:
                # Where the outputs of several layers are added there is no constant, so each bias is mapped alone.
                linear.bias = _frozen(mapping(linear.bias.detach().cpu()).to(linear.bias.dtype))
                touched.add(f"{name}.bias")
        for name, output_last in ends.stacks:
            owner, _, leaf = name.rpartition(".")
            stacked = model.get_parameter(name).detach()
            setattr(model.get_submodule(owner), leaf, _frozen(mapping.folded(stacked, output_last)))
            touched.add(name)
    return tuple(sorted(touched))


def _frozen(tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
