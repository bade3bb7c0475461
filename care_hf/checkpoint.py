"""A repair as a small file of its own, an adapter: saved from a repaired model, and put on its base again."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from . import base_fingerprint, subspace_files
from .adapters import unwrapped
from .configuration_care import CareConfig, auto_class
from .modeling_care import CareForConditionalGeneration
from .subspace import SafetySubspaces

logger = logging.get_logger(__name__)

ADAPTER_FILE = "care_adapter.safetensors"
PLACED = ("cache_dir", "force_download", "local_files_only", "proxies")
CONFIGURED = (*PLACED, "subfolder", "trust_remote_code", "code_revision")
MATCH = "base_match"


def save_adapter(
    repaired: CareForConditionalGeneration,
    folder_or_repo: str | os.PathLike,
    *,
    push_to_hub: bool = False,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a repair",
) -> None:
    """Save the repair without its base: one safetensors file of some MB, which names its base.

    Its tensors are named by site (``sites.16.ffn.visual.basis``, float32); its header holds, as JSON, the settings, the
    origin of the repair, what the base is told by (see `base_fingerprint`) and a digest of it all.

    Args:
        repaired: a repaired model; adapters of PEFT in it belong to its base, and are not saved.
        folder_or_repo: a folder, made if need be, or a file ending in ".safetensors"; with `push_to_hub` a Hub id.
        push_to_hub: upload it, and write nothing here.
        token: for the upload, as everything that follows; as in `huggingface_hub`.
        private: of a repo that is made.
        revision: the branch.
        commit_message: of the upload.

    Raises:
        TypeError: the model is not repaired.
        ValueError: the repair is not whole, or its sites differ in strength, which a file has one of.
        OSError: it cannot be written, or uploaded; an older file stays.
    """
    if not isinstance(repaired, CareForConditionalGeneration):
        raise TypeError(f"A {type(repaired).__name__} has no repair to save; give what `care_hf.fit` returned.")
    repaired.check()
    for name in ("strength", "fusion_weight"):
        found = {float(getattr(part, name)) for part in repaired.care_modules().values() if hasattr(part, name)}
        if len(found) > 1:
            raise ValueError(f"Sites differ in {name}, {sorted(found)}, and an adapter has one; set them all alike.")
    subspaces = SafetySubspaces.from_model(repaired)
    tensors, settings = subspaces.content()
    facts, values = base_fingerprint.describe(repaired.vlm)
    metadata = {name: text for name, text in subspaces.metadata.items() if name != MATCH}
    content = subspace_files.content({**tensors, "base.values": values}, settings, metadata, facts)
    if push_to_hub:
        _upload(content, os.fspath(folder_or_repo), token, private, revision, commit_message)
        return
    path = Path(folder_or_repo)
    path = path if path.suffix == ".safetensors" else path / ADAPTER_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    subspace_files.replace_file(path, content)


def push_adapter(
    file: Path,
    repo: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a repair",
) -> str:
    """Upload an adapter that `save_adapter` wrote, once it was read; arguments as there.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the file is broken, changed or of a later format.
        OSError: it cannot be read or uploaded.
    """
    subspace_files.read(file)
    return _upload(file.read_bytes(), repo, token, private, revision, commit_message)


def _upload(content: bytes, repo: str, token, private, revision, commit_message: str) -> str:
    api = huggingface_hub.HfApi(token=token)
    repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
    where = {"path_in_repo": ADAPTER_FILE, "repo_id": repo, "revision": revision, "commit_message": commit_message}
    return api.upload_file(path_or_fileobj=content, **where).commit_url


def load_adapter(
    base: PreTrainedModel | str | os.PathLike,
    adapter: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    other_base: bool = False,
    base_revision: str | None = None,
    **kwargs: Any,
) -> CareForConditionalGeneration:
    """Put a repair that `save_adapter` saved on its base.

    Args:
        base: the loaded model, which stays as it is and shares its weights with the result: in any dtype, on any
            device, quantised, or a `PeftModel`; or a folder or Hub id to load it from.
        adapter: a folder or file, or, if there is none of that name, a Hub id.
        revision: of the adapter on the Hub.
        token: for both.
        other_base: put it on another base than its own. The width must fit, and the sites must exist; whether the
            repair does anything good there is yours to measure.
        base_revision: of the base on the Hub.
        kwargs: for the `from_pretrained` of the base: "dtype", "device_map", "quantization_config", ...

    Returns:
        The repaired model. How surely the base is the right one is in ``config.origin["base_match"]``: "exact", or
        what was compared in a coarser dtype, or in part since the base is quantised.

    Raises:
        ValueError: the file is broken, changed or of a later format; or the base is another, or is not named.
        TypeError: the base is repaired already, of a class that no Auto class loads, or arguments for loading came with
            a loaded base.
        OSError: there is no such adapter or base.
    """
    loaded = not isinstance(base, (str, os.PathLike))
    if loaded and (kwargs or base_revision is not None):
        raise TypeError(f"{sorted(kwargs) or 'base_revision'} is for loading a base, and this one is loaded already.")
    path = _find(adapter, revision, token, {name: kwargs[name] for name in PLACED if name in kwargs})
    arguments, facts, values = subspace_files.read(path)
    subspaces = SafetySubspaces(**arguments)
    model = unwrapped(base) if loaded else _load_base(base, {"revision": base_revision, "token": token}, kwargs)
    if isinstance(model, CareForConditionalGeneration):
        raise TypeError("The base is repaired already; give the model that it was repaired from.")
    match = _check_base(adapter, facts, values, model, other_base)
    subspaces = replace(subspaces, metadata={**subspaces.metadata, MATCH: match})
    repaired = CareForConditionalGeneration.from_base(model, subspaces)
    repaired.check()
    return repaired


def _find(adapter: str | os.PathLike, revision: str | None, token: Any, placed: dict[str, Any]) -> Path:
    path = Path(adapter)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / ADAPTER_FILE).is_file():
            whole = "It is a whole checkpoint: load it with AutoModel." if (path / "config.json").is_file() else ""
            raise FileNotFoundError(f"{path} holds no {ADAPTER_FILE}, which `save_adapter` writes. {whole}".strip())
        return path / ADAPTER_FILE
    name = str(adapter)
    if isinstance(adapter, os.PathLike) or name.startswith((".", "~", "/")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name} is neither a file nor a folder, and no repo on the Hub (owner/name).")
    return Path(huggingface_hub.hf_hub_download(name, ADAPTER_FILE, revision=revision, token=token, **placed))


def _load_base(base: str | os.PathLike, hub: dict[str, Any], kwargs: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(base, **hub, **{name: kwargs[name] for name in CONFIGURED if name in kwargs})
    if isinstance(config, CareConfig):
        raise TypeError(f"{base} is repaired already; name the model that it was repaired from.")
    return auto_class(config).from_pretrained(base, **hub, **kwargs)


def _check_base(adapter, facts: dict[str, Any] | None, values: Any, model: PreTrainedModel, other_base: bool) -> str:
    """How surely the base is the one of the adapter.

    Raises:
        ValueError: it is not, and that is not wanted.
    """
    advice = (
        "Load that base, or fit a repair of this one; other_base=True puts it on this one all the same, which you must "
        "measure before you rely on it."
    )
    try:
        if facts is None:
            raise ValueError("it does not name its base, as no file of `SafetySubspaces` or of the first format does")
        match = base_fingerprint.compare(facts, values, model)
    except ValueError as error:
        if other_base:
            logger.warning(f"The adapter {adapter} is put on another base than its own: {error}.")
            return f"another base: {error}"
        raise ValueError(f"The adapter {adapter} is not for this {type(model).__name__}: {error}. {advice}") from error
    if ";" in match:  # in part
        logger.warning(f"The base is the one of the adapter {adapter} as far as it can be compared: {match}.")
    return match
