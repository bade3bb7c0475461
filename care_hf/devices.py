"""Where a model computes."""

import torch
from torch import nn


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
