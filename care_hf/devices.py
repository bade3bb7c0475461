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

    # What transformers shares out by tensors need not all be DTensors; DeepSpeed marks what it shares out with an id.
    wrapped = any(
        isinstance(module, FullyShardedDataParallel) or (getattr(module, "_tp_size", None) or 1) > 1
        for module in model.modules()
    )
    return wrapped or any(is_shared_out(p) or hasattr(p, "ds_id") for p in model.parameters())


def is_shared_out(tensor: torch.Tensor | None) -> bool:
    """Whether several processes have a part each of a tensor."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
