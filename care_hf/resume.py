"""Keep long work in a file, so that it can go on after an interruption; tell one work from another."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .adapters import adapter_settings
from .samples import Sample

SAVE_SECONDS = 300  # how much work a killed process may lose, where it resumes


def model_fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes, dtypes and some 64 values of all parameters, and of what adapters are beside those."""
    digest = hashlib.sha256()
    settings = adapter_settings(model)
    if settings:
        digest.update(json.dumps(settings).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:  # offloaded: name and shape must do
            values = _whole(parameter.detach()).flatten()
            some = values[:: max(1, len(values) // 64)].contiguous()
            digest.update(some.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where processes share it out; all of them come here."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def answers_fingerprint(model: nn.Module, processor) -> str:
    """A hash of what answers depend on beside the prompt: model, repair and whether it is on, template, decoding."""
    config, decoding = model.config.to_dict(), model.generation_config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        config.pop(name, None)
        decoding.pop(name, None)
    repairs = getattr(getattr(model, "care_state", None), "enabled", None)
    template = str(getattr(processor, "chat_template", None))
    told = [model_fingerprint(model), _of_buffers(model), config, repairs, template, decoding]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def prompts_fingerprint(prompts: Sequence[Any]) -> str:
    """A hash of prompts (anything with chat `messages`) in their order."""
    # `Sample.digest` has texts and images in an order of their own.
    order = [[[part["type"] for part in message["content"]] for message in prompt.messages] for prompt in prompts]
    told = [[Sample(prompt.messages).digest for prompt in prompts], order]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _of_buffers(model: nn.Module) -> str:
    """A hash of all persistent buffers, in which repairs are."""
    digest = hashlib.sha256()
    # Not by `state_dict`, for which bitsandbytes changes 4-bit weights.
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, value in module._buffers.items():
            if value is not None and not value.is_meta and name not in module._non_persistent_buffers_set:
                full = f"{prefix}.{name}" if prefix else name
                digest.update(full.encode() + value.contiguous().flatten().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(path: Path, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str]) -> None:
    """Write `tensors` and `notes`, whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    save_file(dict(tensors), partial, metadata=dict(notes))
    os.replace(partial, path)


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read what `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}); delete it or name another file.") from error
