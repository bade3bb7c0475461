"""Where a model computes, and who holds it."""

import torch
from torch import distributed, nn


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its first weight is or, if that is offloaded, where it is brought to.

    Raises:
        ValueError: nothing brings the weights.
    """
    if model.device.type != "meta":
        return model.device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    raise ValueError(
        f"{type(model).__name__} has no weights: they are on the device 'meta', and no hook of accelerate brings them. "
        "Load it with `from_pretrained`, offloaded by a `device_map` if need be."
    )


def is_spread(model: nn.Module) -> bool:
    """Whether several processes hold a model together, so that all must run every batch: by tensors, FSDP or ZeRO-3."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    # What transformers shares out need not all be DTensors; DeepSpeed marks what it shares out with an id.
    wrapped = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    shared = any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())
    return wrapped or shared or is_split_by_tensors(model)


def is_split_by_tensors(model: nn.Module) -> bool:
    """Whether every process computes but its part of each layer: the units of an FFN, some attention heads."""
    return any((getattr(module, "_tp_size", None) or 1) > 1 for module in model.modules())
