"""What a repaired checkpoint or an adapter is, read from its headers and its own tensors: never the base's weights."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from . import subspace_files
from .checkpoint import ADAPTER_FILE
from .configuration_care import FORMAT, CareConfig, hub_name
from .inspection import Inspection, describe, sizes
from .loading import INDEX, check_source, compare_digests, digest_of, named_errors, of_the_repair
from .repair_files import base_class, repair_of
from .subspace import SafetySubspaces
from .tensor_files import HubFiles, LocalFiles, Stored, stored

WEIGHTS = "model.safetensors"
FOR = (
    "`care info` reads a repaired checkpoint (of `save_pretrained` or `push_to_hub`), an adapter (of `save_adapter`) "
    "or a file of `SafetySubspaces`: give a folder, a file, or a Hub id"
)


def inspect(source: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None) -> Inspection:
    """Read what a repair is.

    Args:
        source: the folder or Hub id of a repaired checkpoint; the folder, file or Hub id of an adapter; a file of
            `SafetySubspaces`.
        revision: on the Hub.
        token: as in `huggingface_hub`.

    Raises:
        ValueError: it is something else, and the message says what; or it is broken, changed or of a later format, and
            would not load either.
        OSError: there is no such file, folder or repo, or it may not be read.
    """
    path = Path(source)
    if path.is_file():
        return _of_adapter(path, source)
    if path.is_dir():
        files: LocalFiles | HubFiles = LocalFiles(path)
    else:
        name = str(source)
        if isinstance(source, os.PathLike) or name.startswith((".", "~", "/")) or name.count("/") != 1:
            raise FileNotFoundError(
                f"{name} is neither a file nor a folder, and no repo on the Hub (owner/name). {FOR}."
            )
        files = HubFiles(name, revision, token)
    config = files.path("config.json")
    if config is not None and isinstance(files, HubFiles):
        files = files.pinned(config)
    with named_errors(source):
        values = {} if config is None else CareConfig.get_config_dict(config.parent)[0]
    if values.get("model_type") == CareConfig.model_type:
        return _of_checkpoint(files, values, source, token)
    adapter = files.path(ADAPTER_FILE)
    if adapter is not None:
        return _of_adapter(adapter, source)
    raise ValueError(f"{source} {_other(files, values)}. {FOR}.")


def _other(files: LocalFiles | HubFiles, values: Mapping[str, Any]) -> str:
    """What a folder or repo is that is not repaired."""
    if values:
        return (
            f"is an ordinary checkpoint of a {values.get('model_type')!r}, without a repair; or its repair was merged "
            "into the weights, where nothing tells it any more: look at the checkpoint or adapter that it came from"
        )
    if files.path("adapter_config.json") is not None:
        return "is an adapter of PEFT, without a repair"
    return f"holds neither a config.json nor a {ADAPTER_FILE}"


def _of_checkpoint(files: LocalFiles | HubFiles, values: dict[str, Any], source, token) -> Inspection:
    with named_errors(source):
        if isinstance(files, LocalFiles):
            check_source(files.folder, {})
        else:
            check_source(files.repo, {"revision": files.revision, "token": token})
        config = CareConfig.from_dict(values)
        headers = _headers(files)
        subspaces, tensors = repair_of(config, headers, files)
    verified = config.repair_digest is not None or config.care_format >= FORMAT
    if verified:
        compare_digests(config, digest_of(config, tensors))
    held = [(key, stored) for header in headers.values() for key, stored in header.items()]
    own, of_base = ([stored for key, stored in held if of_the_repair(key) == ours] for ours in (True, False))
    return describe(
        subspaces,
        strengths={key: float(named["strength"]) for key, named in tensors.items() if key != "gate"},
        source=str(source),
        kind="repaired checkpoint",
        format=config.care_format,
        base=_base_of(config),
        adapters={name: _peft(name, entry, config.active_adapters) for name, entry in config.adapters.items()},
        sizes=sizes(of_base, own),
        verified=verified or None,
    )


def _headers(files: LocalFiles | HubFiles) -> dict[str, dict[str, Stored]]:
    """Of every file of weights; as transformers, of one file rather than of those in an index."""
    single = files.header(WEIGHTS)
    if single is not None:
        return {WEIGHTS: single}
    index = files.path(INDEX)
    if index is None:
        raise OSError(f"There is neither {WEIGHTS} nor {INDEX}; get or save the checkpoint again.")
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    headers = {name: files.header(name) for name in names}
    missing = [name for name, header in headers.items() if header is None]
    if missing:
        raise OSError(f"{INDEX} names {missing}, which are not there; get or save the checkpoint again.")
    return headers


def _base_of(config: CareConfig) -> dict[str, Any]:
    base, text = config.vlm_config, config.get_text_config()
    quantisation = getattr(config, "quantization_config", None)  # its own, or the base's
    quantisation = quantisation.to_dict() if hasattr(quantisation, "to_dict") else quantisation or {}
    method = quantisation.get("quant_method")
    return {
        "name": hub_name(base),
        "class": base_class(config),
        "model_type": base.model_type,
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "vocabulary": text.vocab_size,
        "dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
        "quantised": None if method is None else str(getattr(method, "value", method)),
    }


def _peft(name: str, entry: Mapping[str, Any], active) -> dict[str, Any]:
    return {"kind": str(entry["peft_type"]), "rank": entry.get("r"), "active": name in active}


def _of_adapter(path: Path, source) -> Inspection:
    arguments, facts, _ = subspace_files.read(path)
    with named_errors(source):
        subspaces = SafetySubspaces(**arguments)
        with safe_open(path, "pt") as file:
            version = file.metadata()["format"]
    tensors = subspaces.content()[0].values()
    own = [stored(str(tensor.dtype).removeprefix("torch."), tensor.shape) for tensor in tensors]
    facts = facts or {}
    names = ("name", "class", "model_type", "layers", "hidden_size", "vocabulary", "dtype", "quantised")
    return describe(
        subspaces,
        strengths={f"sites.{site}": subspaces.strength for site in subspaces.sites},
        source=str(source),
        kind="adapter" if facts else "subspaces",
        format=version,
        base={name: facts.get(name) for name in names},
        adapters={},
        sizes=sizes(_weights(facts), own),
        verified=True if version != subspace_files.BEFORE else None,
    )


def _weights(facts: Mapping[str, Any]) -> list[Stored] | None:
    """The weights that the base of an adapter had; None if it does not say, or does not say all."""
    try:
        found = [stored(dtype, shape) for _, shape, dtype in facts["weights"]]
        return found if facts["unread"] == 0 else None
    except (KeyError, TypeError, ValueError):
        return None
