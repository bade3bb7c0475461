"""Models by name: what every command opens first."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import distributed
from transformers import AutoConfig, PreTrainedModel

from .configuration_care import CareConfig, auto_class
from .devices import input_device
from .fitting import load_processor
from .modeling_care import CareForConditionalGeneration
from .settings_files import meant
from .sites import decoder_layers, hidden_size

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class Opened:
    """A model and its processor.

    Attributes:
        source: the folder or Hub id.
        model: in evaluation mode.
        processor: its processor.
    """

    source: str
    model: PreTrainedModel
    processor: Any

    @property
    def facts(self) -> dict[str, str]:
        """What the model is, for people."""
        model = self.model
        base = model.vlm if isinstance(model, CareForConditionalGeneration) else model
        parameters = sum(parameter.numel() for parameter in model.parameters())
        told = f"{type(base).__name__}, {len(decoder_layers(base))} decoder layers of width {hidden_size(base)}"
        return {
            "model": f"{self.source}: {told}",
            "weights": f"{parameters:,} in {str(model.dtype).removeprefix('torch.')} on {self.device}",
            "memory": free_memory(input_device(model)),
        }

    @property
    def device(self) -> str:
        """Where the model is; several places if it is spread."""
        return ", ".join(sorted({str(parameter.device) for parameter in self.model.parameters()}))


def open_model(source: str, device: str = "auto", dtype: str = "auto", repaired: bool | None = None) -> Opened:
    """Load a model and its processor.

    Args:
        source: a folder or Hub id.
        device: "auto" for accelerators as far as they go; or "cpu", "cuda:1".
        dtype: one of `DTYPES`; "auto" is that of the checkpoint.
        repaired: whether it must be a repaired one, must not be, or None for either.

    Raises:
        ValueError: device, dtype or source are nothing that is known, or the model is repaired and must not be, or is
            not and must be.
        OSError: there is no such model.
    """
    check_source(source)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; choose one of {DTYPES}.")
    check_device(device)
    config = _config(source)
    is_repaired = isinstance(config, CareConfig)
    if repaired is not None and repaired != is_repaired:
        raise ValueError(
            f"{source} is no repaired model but a {config.model_type!r}; give what `care fit` wrote."
            if repaired
            else f"{source} is repaired already; give the model that it was made from."
        )
    auto = CareForConditionalGeneration if is_repaired else auto_class(config)
    model = auto.from_pretrained(source, dtype=dtype, device_map=_device_map(device)).eval()
    processor = load_processor(model)
    return Opened(source, model, processor)


def _config(source: str):
    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        if Path(source).is_dir():
            raise
        beside = [path.name for path in Path(source).parent.iterdir()] if Path(source).parent.is_dir() else []
        raise OSError(
            f"There is no folder {source!r} here.{meant(Path(source).name, beside)} As the id of a model on the Hub it "
            f"cannot be loaded either: {error}"
        ) from error


def check_source(source: str) -> None:
    """Assert that a model is named by an existing folder, or by what can be a Hub id.

    Raises:
        FileNotFoundError: it is not, or the folder holds no model.
    """
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise FileNotFoundError(f"{source} holds no config.json, so no model; name the folder of one.")
        return
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise FileNotFoundError(f"{source!r} is no folder, and no id of a model on the Hub (owner/name).") from error


def check_device(device: str) -> None:
    """Assert that a device exists here.

    Raises:
        ValueError: it does not.
    """
    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"device={device!r} cannot be used here ({reason}); choose 'auto', 'cpu' or another."
        ) from error


def _device_map(device: str) -> str | torch.device | None:
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        own = PartialState().device  # every process has one, and a whole model there
        if device == own.type or (device == "auto" and own.type != "cpu"):
            return own
    if device == "auto":
        return "auto" if torch.accelerator.is_available() else None
    return None if device == "cpu" else device


def free_memory(device: torch.device) -> str:
    """How much memory is free where a model computes, as words."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        where = torch.cuda.get_device_name(device)
    else:
        import psutil  # accelerate needs it as well

        memory = psutil.virtual_memory()
        free, total, where = memory.available, memory.total, "this machine"
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free on {where}"
