"""What keeps a repair whole on quantised weights: sharing them, naming what is not quantised, and saving them."""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import get_keys_to_not_convert

BASE = "vlm."  # what names of the base's modules begin with in the repaired model
SINGLE = "is a single linear layer"
INSTEAD = (
    "Quantised layers are not put where a repair is, so the checkpoint could not be loaded; save the repair of the "
    "base in floating point, and load that with a quantization_config, or repair another site."
)
SKIPPED = ("modules_to_not_convert", "llm_int8_skip_modules")  # as torchao and others, and bitsandbytes call them


def settle(model: nn.Module) -> list[Any]:
    """Have bitsandbytes' 8-bit layers take up what they keep on the weight until they first run, and return it all.

    The first layer to run takes it off the weight: of two that share one, the other would take the int8 numbers for the
    weight itself.
    """
    kept = []
    for module in model.modules():
        if hasattr(module, "init_8bit_state"):
            if getattr(module.weight, "CB", None) is not None:
                module.init_8bit_state()
            kept += [value for value in vars(module.state).values() if isinstance(value, torch.Tensor)]
    return kept


def in_repaired(model: nn.Module, adapter_tensors: Iterable[str] = ()) -> Any:
    """The quantisation of a base as that of the repaired model, whose modules are named otherwise; None without.

    Args:
        model: the base.
        adapter_tensors: the names, in their layer, of tensors that adapters added after it was quantised.
    """
    quantization = copy.deepcopy(getattr(model.config, "quantization_config", None))
    added = {name.rpartition(".")[0].lstrip(".") for name in adapter_tensors}
    for name in SKIPPED:
        if not hasattr(quantization, name):
            continue
        skipped = getattr(quantization, name)
        if skipped is None and added:
            skipped = get_keys_to_not_convert(model)
        if skipped is not None:
            # Not in place of the old names: also the last parts of one are looked for.
            named = [*skipped, *(BASE + module for module in skipped), *(rf".*\.{re.escape(part)}" for part in added)]
            setattr(quantization, name, sorted(set(named)))
    return quantization


def check_saveable(model: nn.Module) -> None:
    """Assert that bitsandbytes has not repacked 4-bit weights, as it does where they run on some CPUs.

    Packing rounds their scales, and undoing it, as every `state_dict` does, leaves them in disorder.

    Raises:
        ValueError: it has.
    """
    for name, parameter in model.named_parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes repacked the 4-bit weight {name} when it ran on the CPU, and would save it changed; "
                "load the base again, and save its repair before it runs."
            )


@contextmanager
def saving(quantizer: Any) -> Iterator[None]:
    """Within it torchao's metadata lists no tensor of the top module, whose names have no dot: it cannot read them.

    Raises:
        NotImplementedError: transformers cannot turn what it loaded back into what it loaded it from.
    """
    if quantizer is None:
        yield
        return
    given = quantizer.get_state_dict_and_metadata

    def dotted(*args, **kwargs):
        state, metadata = given(*args, **kwargs)
        if "tensor_names" in metadata:
            names = [name for name in json.loads(metadata["tensor_names"]) if "." in name]
            metadata = {**metadata, "tensor_names": json.dumps(names)}
        return state, metadata

    quantizer.get_state_dict_and_metadata = dotted
    try:
        yield
    except NotImplementedError as error:
        raise NotImplementedError(
            f"transformers cannot save weights again that it loaded quantised ({type(quantizer).__name__}); copy the "
            "folder that they are from."
        ) from error
    finally:
        del quantizer.get_state_dict_and_metadata


def check_linear(module: nn.Module, where: str) -> None:
    """Assert that a repaired module, if it is a single linear layer, holds weights that it can multiply with.

    Raises:
        ValueError: it holds quantised numbers that another class of layer wrote.
    """
    weight = module._parameters.get("weight")
    if type(module).__mro__[2] is nn.Linear and not (weight.is_floating_point() or weight.is_complex()):
        raise ValueError(f"{where} {SINGLE}, and its weight is of {weight.dtype}. {INSTEAD}")


def check_saved(module: nn.Module, where: str) -> None:
    """Assert that a repaired module, if it is a single linear layer, is of a class that loading makes again.

    Raises:
        ValueError: it is one that quantisation puts in place of a linear layer, which it does not where a repair is.
    """
    if isinstance(module, nn.Linear) and type(module).__mro__[2] is not nn.Linear:
        raise ValueError(f"{where} {SINGLE} of {type(module).__mro__[2].__name__}. {INSTEAD}")
