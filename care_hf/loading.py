"""What is asserted of a repaired checkpoint before and after transformers reads it, so that it loads whole or not."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file

from .adapters import adapter_layers
from .configuration_care import FORMAT

INDEX = "model.safetensors.index.json"
SAFE_NAME = re.compile(r"[^/\\:\0]+\.safetensors")  # of a file beside its index, never one elsewhere
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf")
PLACED = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
ADVICE = "It would not run as repaired, so it is not loaded; save it again from the repaired model."


class LoadsWhole:
    """Gives a repaired model a `from_pretrained` that loads it whole, and as it was saved, or not at all."""

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but a checkpoint whose repair is not whole raises instead of loading.

        Whatever lies in a folder or Hub repo, nothing but safetensors is opened there.

        Raises:
            ValueError: a tensor of the repair or of the base is missing; a tensor or setting of the repair has another
                shape, is unknown, holds what it cannot hold or is not, bit for bit, what was saved; the checkpoint is
                of a later format; a file is broken, or names one outside its folder; pickles are asked for; or a folder
                of an adapter is named.
            OSError: there is no such checkpoint, or none in safetensors.
            RuntimeError, TypeError: transformers finds weights or arguments that do not fit.
            ImportError: the checkpoint has adapters, and PEFT is not installed.
        """
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        check_source(source, kwargs)
        if source is not None:
            kwargs["use_safetensors"] = True
        with named_errors(source):
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if model._hf_peft_config_loaded:
            # What transformers reports then is what the adapter lacks, not what the repaired model does.
            raise ValueError(
                "An adapter cannot be loaded in one step with the repaired model that it is for, since that could not "
                "be checked; load the repaired model, then the adapter with `load_adapter` or `PeftModel`."
            )
        check_keys(info, tuple(f"vlm.{name}." for name in adapter_layers(model.vlm)))
        model.check()
        check_digest(model)
        return (model, info) if output_loading_info else model

    def _move_missing_keys_from_meta_to_device(self, missing_keys, *args, **kwargs):
        """Before memory is taken and filled for what no file held: it may be a model of any size."""
        check_sizes(self, missing_keys)
        return super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)


def of_the_repair(key: str) -> bool:
    """Whether a tensor of that name belongs to the repair."""
    return ".care." in key or ".care_gate." in key or key == "layers"


def check_source(source: Any, options: Mapping[str, Any]) -> None:
    """Assert that loading from `source` will open safetensors files in its folder, and nothing else.

    Files may be links, of which the Hub's cache consists; their names may not lead out of the folder.

    Args:
        source: a folder, a Hub id, or None if weights come otherwise.
        options: those of `from_pretrained`.

    Raises:
        ValueError: pickles or another format are asked for, or an index names a file elsewhere.
        OSError: a folder holds weights in other formats alone.
    """
    if options.get("use_safetensors") is False or options.get("gguf_file"):
        raise ValueError(
            "Repaired checkpoints are safetensors alone: other formats can run code (pickles) or lose the repair; "
            "leave use_safetensors and gguf_file out."
        )
    if source is None:
        return
    folder = Path(source, options.get("subfolder") or "")
    if folder.is_dir():
        _check_formats(folder)
    index = _with_variant(INDEX, options.get("variant"))
    if folder.is_dir():
        found = folder / index if (folder / index).is_file() else None
    else:
        placed = {name: options[name] for name in PLACED if options.get(name) is not None}
        lenient = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
        found = cached_file(source, index, **placed, **{f"_raise_exceptions_for_{k}": v for k, v in lenient.items()})
    if found is not None:
        _check_index(Path(found))


def _with_variant(name: str, variant: str | None) -> str:
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


def _check_formats(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name.endswith(PICKLES)]
    if others and not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        raise OSError(
            f"{folder} holds no safetensors file, only {others}. Repaired checkpoints are safetensors alone, for other "
            "formats can run code or lose the repair; get the checkpoint again from who made it."
        )


def _check_index(path: Path) -> None:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = set(index["weight_map"].values())
        whole = isinstance(index["metadata"], dict)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.name} is no index of safetensors files ({error!r}); get it again.") from error
    foreign = sorted(repr(name) for name in names if not (isinstance(name, str) and SAFE_NAME.fullmatch(name)))
    if foreign or not whole:
        raise ValueError(
            f"{path.name} names {', '.join(foreign[:3]) or 'no metadata'}; it may only name safetensors files that lie "
            "beside it. The checkpoint is broken or hostile, and is not loaded."
        )


@contextmanager
def named_errors(source: Any) -> Iterator[None]:
    """Errors that transformers does not foresee of broken files become a `ValueError` that names the checkpoint."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, TypeError, ImportError, MemoryError):
        raise
    except Exception as error:  # of safetensors, of dataclasses, or whatever a base's class makes of strange settings
        raise ValueError(
            f"The checkpoint {str(source)!r} cannot be loaded: {type(error).__name__}: {error}. A file is broken, "
            "truncated, or of another version; get or save it again."
        ) from error


def check_keys(info: Mapping[str, Any], adapted: tuple[str, ...]) -> None:
    """Assert that every tensor of the model was in the files, and no tensor of a repair beside them.

    Args:
        info: the loading information of transformers.
        adapted: what names of tensors in modules with adapters begin with.

    Raises:
        ValueError: a tensor is missing, of another shape, or of a repair that the configuration does not know.
    """
    missing = sorted(info["missing_keys"])
    foreign = sorted(key for key in info["unexpected_keys"] if of_the_repair(key) or key.startswith(adapted))
    reshaped = sorted(
        str(key) for key in info["mismatched_keys"] if of_the_repair(str(key)) or "layers" in str(key).split("'")
    )
    for what, keys in (
        ("lacks", missing),
        ("has, unknown to its config.json,", foreign),
        ("has in another shape", reshaped),
    ):
        if keys:
            raise ValueError(f"The checkpoint {what} {len(keys)} tensors: {', '.join(keys[:5])}. {ADVICE}")


def check_sizes(model: nn.Module, missing: Collection[str]) -> None:
    """Assert that most of a model was in the files.

    Sizes that config.json lacks are those of the largest models, for which random weights would be drawn for minutes
    until `check_keys` refuses them.

    Args:
        model: its parameters are on the meta device where they are not loaded.
        missing: names of what the files lack, or have in another shape; tied weights may be among them.

    Raises:
        ValueError: more than half of the model's numbers are missing.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    lacking = {name: size for name, size in sizes.items() if name in missing and not _tied(model, name)}
    if 2 * sum(lacking.values()) > sum(sizes.values()):
        raise ValueError(
            f"The checkpoint's config.json describes a model of {sum(sizes.values()):,} parameters, of which its files "
            f"lack {sum(lacking.values()):,}: {', '.join(sorted(lacking)[:5])}. {ADVICE}"
        )


def _tied(model: nn.Module, name: str) -> bool:
    return getattr(model.get_parameter(name), "_is_hf_initialized", False)


def repair_digest(model: nn.Module, state: Mapping[str, torch.Tensor] | None = None) -> str:
    """A hash of every bit of the repair of a `CareForConditionalGeneration`: its tensors and its settings.

    Tensors go by site, so that modules may be renamed; where the model is, and in which dtype, does not matter.

    Args:
        model: the repaired model; nothing of its repair is on the meta device.
        state: what is saved in place of the model's own tensors, if so.
    """
    config, names = model.config, {id(module): name for name, module in model.named_modules()}
    parts = [(f"sites.{site}", module, "care") for site, module in model._site_modules().items()]
    if config.gate:
        parts.append(("gate", model._gate_module(), "care_gate"))
    tensors = {}
    for key, module, kind in parts:
        buffers = getattr(module, kind).named_buffers()
        tensors[key] = {leaf: (state or {}).get(f"{names[id(module)]}.{kind}.{leaf}", b) for leaf, b in buffers}
    return digest_of(config, tensors)


def digest_of(config: Any, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    """The same of a `CareConfig` and the repair's tensors by place ("sites.16.ffn", "gate") and name ("text.basis")."""
    settings = {name: getattr(config, name) for name in ("sites", "fusion", "scope", "gate")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for key, named in sorted(tensors.items()):
        for leaf, tensor in sorted(named.items()):
            value = tensor.detach()
            value = value.float() if value.is_floating_point() else value.long()
            digest.update(f"{key}.{leaf} {tuple(value.shape)}".encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def check_digest(model: nn.Module) -> None:
    """Assert that the repair is the one that was saved, bit for bit.

    Raises:
        ValueError: it is not.
    """
    compare_digests(model.config, repair_digest(model))


def compare_digests(config: Any, found: str) -> None:
    """Assert that a repair's digest is the one in its `CareConfig`.

    Raises:
        ValueError: it is not.
    """
    if config.repair_digest is None and config.care_format < FORMAT:
        return  # of a version that wrote none
    if found != config.repair_digest:
        raise ValueError(
            f"The repair has the digest {found[:12]}, but config.json says {str(config.repair_digest)[:12]}: a tensor "
            f"or setting of the repair was changed or damaged after it was saved. {ADVICE}"
        )
