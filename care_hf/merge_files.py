"""The files of a merged checkpoint: the base's own, in which only what changes is written anew."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}
NOT_THE_BASES = {"config.json", INDEX, "pytorch_model.bin.index.json", "README.md", ".gitattributes"}


@dataclass(frozen=True)
class Originals:
    """The safetensors files of a base.

    Attributes:
        folder: where they are.
        files: file names by tensor.
    """

    folder: Path
    files: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> "Originals | None":
        """Those in `folder`; None if they are not there or not whole."""
        single, index = folder / SINGLE, folder / INDEX
        if single.is_file():
            with safe_open(single, "pt") as file:
                return cls(folder, dict.fromkeys(file.keys(), SINGLE))
        if not index.is_file():
            return None
        files = json.loads(index.read_text())["weight_map"]
        return cls(folder, files) if all((folder / name).is_file() for name in set(files.values())) else None

    def dtype_of(self, name: str) -> torch.dtype:
        """That of a tensor."""
        return self.tensor(name)[:0].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, which stays in its file until it is read."""
        with safe_open(self.folder / self.files[name], "pt") as file:
            return file.get_tensor(name)

    def why_not(self, model: PreTrainedModel) -> str | None:
        """Why these are not the weights of `model`; None if they are."""
        for name, tensor in saved_tensors(model, model.state_dict()).items():
            if name not in self.files:
                return f"there is no {name}"
            stored = self.tensor(name)
            if torch.promote_types(stored.dtype, tensor.dtype) != tensor.dtype:
                return f"{name} is of {stored.dtype} there and of {tensor.dtype} in memory"
            if stored.shape != tensor.shape or not torch.equal(stored.to(tensor.dtype), tensor.cpu()):
                return f"{name} is another there"
        return None


def find_originals(model: PreTrainedModel, base: str | Path | None) -> Originals | None:
    """The files that `model` was loaded from, if they hold its weights.

    Args:
        model: the base in memory.
        base: a folder or a repository of the Hub; by default where the model's configuration says it is from, and only
            if that is a folder or in the Hub's cache.

    Raises:
        ValueError: `base` is given and has no safetensors files, or those of other weights.
    """
    folder = local_folder(base) if base is not None else _remembered_folder(model.config)
    originals = Originals.read(folder) if folder else None
    why = "it has no whole safetensors files" if originals is None else originals.why_not(model)
    if why and base is not None:
        raise ValueError(
            f"base={str(base)!r} is not what the model was made from: {why}. Without `base` all is written from memory."
        )
    return None if why else originals


def local_folder(checkpoint: str | Path) -> Path:
    """A folder itself, or that of a repository of the Hub, downloaded."""
    return Path(checkpoint) if Path(checkpoint).is_dir() else Path(snapshot_download(str(checkpoint)))


def _remembered_folder(config: Any) -> Path | None:
    name = config._name_or_path
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    except ValueError:  # no name that a repository could have
        return None
    return Path(found).parent if isinstance(found, str) else None


def saved_tensors(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model by the names, and in the form, that its checkpoints have them."""
    kept = {name: tensor for name, tensor in state.items() if name not in (model._keys_to_ignore_on_save or ())}
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(kept, model))


def rewrite(originals: Originals, tensors: dict[str, torch.Tensor], added: Sequence[str], folder: Path) -> None:
    """Copy the base's weights to `folder`, and there overwrite `tensors`; those `added` go into a file of their own."""
    new = {name: tensors[name] for name in added}
    changed = {name: tensor for name, tensor in tensors.items() if name not in new}
    for name in sorted(set(originals.files.values())):
        shutil.copyfile(originals.folder / name, folder / name)
        within = {key: tensor for key, tensor in changed.items() if originals.files[key] == name}
        if within:
            _overwrite(folder / name, within)
    index = originals.folder / INDEX
    content = json.loads(index.read_text()) if index.is_file() and not (originals.folder / SINGLE).is_file() else None
    if new:
        content = _add_file(new, folder, content, originals.files)
    if content:
        (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _overwrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, tensor in tensors.items():
            begin, end = header[name]["data_offsets"]
            if tensor.nbytes != end - begin or list(tensor.shape) != header[name]["shape"]:
                raise ValueError(f"{name} in {path.name} is of another size than what replaces it.")
            file.seek(8 + length + begin)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _add_file(new: dict[str, torch.Tensor], folder: Path, content: dict | None, files: dict[str, str]) -> dict:
    """Write new tensors, and return the index that has them beside the old ones."""
    if content is None:
        # Readers that find a file of this name look for no others.
        (folder / SINGLE).rename(folder / "model-00001-of-00002.safetensors")
        added = "model-00002-of-00002.safetensors"
        size = (folder / "model-00001-of-00002.safetensors").stat().st_size
        content = {
            "metadata": {"total_size": size},
            "weight_map": dict.fromkeys(files, "model-00001-of-00002.safetensors"),
        }
    else:
        added = "model-biases.safetensors"
    save_file(new, folder / added, metadata={"format": "pt"})
    content["weight_map"] |= dict.fromkeys(new, added)
    counts = {
        "total_size": sum(t.nbytes for t in new.values()),
        "total_parameters": sum(map(torch.numel, new.values())),
    }
    for name in set(counts) & set(content["metadata"]):
        content["metadata"][name] += counts[name]
    return content


def write_config(model: PreTrainedModel, originals: Originals | None, flags: set[str], folder: Path) -> None:
    """Write config.json: the base's own, in which only `flags` are set in the text configuration."""
    source = originals and originals.folder / "config.json"
    if not source or not source.is_file():
        model.config.save_pretrained(folder)
        return
    content = json.loads(source.read_text())
    text = model.config.get_text_config()
    if flags and text is model.config:
        content |= dict.fromkeys(flags, True)
    elif flags:
        key = next(key for key in model.config.sub_configs if getattr(model.config, key) is text)
        content[key] = {**content.get(key, {"model_type": text.model_type}), **dict.fromkeys(flags, True)}
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def copy_other_files(source: Path, folder: Path, code: bool) -> None:
    """Copy what a checkpoint has beside weights and config.json: tokenizer, processor, generation settings.

    Args:
        source: a checkpoint.
        folder: where they go.
        code: whether Python files go along.
    """
    for path in sorted(source.iterdir()):
        skipped = path.name in NOT_THE_BASES or path.suffix in WEIGHTS or (path.suffix == ".py" and not code)
        if path.is_file() and not skipped:
            shutil.copyfile(path, folder / path.name)
