"""The file of a repair: safetensors named by site; the header says what it does, for which base, and its hash."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .atomic import replace_file
from .configuration_care import SCOPES
from .gating import Gate
from .projection import FUSIONS, Subspace
from .sites import Site

FORMAT = "care_hf.subspaces.v2"
BEFORE = "care_hf.subspaces.v1"  # without base and digest; read, no longer written
SETTINGS = {"fusion": str, "fusion_weight": float, "strength": float, "scope": str, "gate": dict}
GATE = {"site", "required", "pictured", "prompt_end"}
ADVICE = "copy it again from where it is whole, or save it again"


def write(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    metadata: Mapping[str, str],
    base: Mapping[str, Any] | None = None,
) -> None:
    """Write a file of the latest format, whole or not at all.

    Args:
        path: the file; replaced if it is there.
        tensors: ``sites.16.ffn.visual.basis`` and so on, on any device.
        settings: plain values.
        metadata: strings.
        base: what the repair is for, see `base_fingerprint`; None if that is not known.

    Raises:
        OSError: it cannot be written; an older file stays.
    """
    replace_file(Path(path), content(tensors, settings, metadata, base))


def content(
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    metadata: Mapping[str, str],
    base: Mapping[str, Any] | None = None,
) -> bytes:
    """The bytes that `write` writes."""
    header = {"format": FORMAT, "settings": json.dumps(settings), "metadata": json.dumps(dict(metadata))}
    if base is not None:
        header["base"] = json.dumps(base)
    # Copies, for tensors that share memory, as those of one subspace at two sites, are not written otherwise.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return save(tensors, metadata={**header, "digest": _digest(header, tensors)})


def _digest(header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None, torch.Tensor | None]:
    """Read a file of this or an older format.

    Returns:
        ``(arguments, base, values)``: the arguments of a `SafetySubspaces`; and what the file says of the base, and
        values of its weights (see `base_fingerprint`), or None for both.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: it is of another or a later format, or not what was written, bit for bit; the message says where.
    """
    header, tensors = _open(Path(path))
    try:
        version = _check_format(header)
        before = dict(tensors)
        settings, metadata = _json(header, "settings"), _json(header, "metadata")
        base = _json(header, "base") if "base" in header else None
        values = _take(tensors, "base.values", torch.float32) if base is not None else None
        arguments = {**_check_settings(settings), **_read_gate(settings.get("gate"), tensors), "metadata": metadata}
        arguments["sites"] = _read_sites(tensors)
        if tensors:
            raise ValueError(f"it holds tensors that belong to no subspace: {sorted(tensors)[:5]}; {ADVICE}.")
        named = {name: text for name, text in header.items() if name != "digest"}
        if version > 1 and _digest(named, before) != header.get("digest"):
            raise ValueError(
                f"its content does not have the digest {header.get('digest')!r} that it had when it was saved, so it "
                f"was changed or damaged since; {ADVICE}."
            )
    except ValueError as error:
        raise ValueError(f"{path} is not loaded: {error}") from error
    return arguments, base, values


def _open(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file of the repair in it.")
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); {ADVICE}.") from error


def _check_format(header: Mapping[str, str]) -> int:
    given = header.get("format")
    numbered = re.fullmatch(r"care_hf\.subspaces\.v([0-9]{1,6})", given or "")
    if numbered and int(numbered[1]) > 2:
        raise ValueError(
            f"it has the format {given!r}, and this version of care_hf reads up to {FORMAT!r}; install a newer one "
            "(pip install -U care_hf)."
        )
    if given not in (FORMAT, BEFORE):
        raise ValueError(f"it has the format {given!r}; this version reads {BEFORE!r} and {FORMAT!r}.")
    return int(numbered[1])


def _json(header: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        value = json.loads(header[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"its header has no {name!r} that is JSON ({error}); {ADVICE}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name!r} in its header is {value!r:.80}, not a JSON object; {ADVICE}.")
    return value


def _take(tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    if name not in tensors:
        raise ValueError(f"it lacks the tensor {name!r}; {ADVICE}.")
    tensor = tensors.pop(name)
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is of {tensor.dtype}; expected {dtype}, without which the repair is not exact.")
    return tensor


def _check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All but the gate, as arguments."""
    unknown, missing = sorted(set(settings) - set(SETTINGS)), {"fusion", "fusion_weight", "strength"} - set(settings)
    if unknown or missing:
        raise ValueError(f"its settings lack {sorted(missing)} and have, unknown here, {unknown}; {ADVICE}.")
    for name, value in settings.items():
        if name == "gate" and value is None:
            continue
        kind = SETTINGS[name]
        fits = type(value) in (int, float) and math.isfinite(value) if kind is float else isinstance(value, kind)
        if not fits:
            raise ValueError(f"its setting {name}={value!r:.80} must be a {kind.__name__}, finite if a number.")
    for name, known in (("fusion", FUSIONS), ("scope", SCOPES)):
        if settings.get(name, known[0]) not in known:
            raise ValueError(f"its setting {name}={settings[name]!r:.80} is not known; expected one of {known}.")
    return {name: value for name, value in settings.items() if name != "gate"}


def _read_gate(described: Mapping[str, Any] | None, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if described is None:
        return {}
    ends, counts = described.get("prompt_end"), [described.get(name) for name in ("required", "pictured")]
    whole = set(described) == GATE and isinstance(described["site"], str) and isinstance(ends, list)
    if not whole or not all(type(number) is int and 0 <= number < 2**31 for number in (*counts, *ends)):
        raise ValueError(f"its gate={described!r:.200} must hold {sorted(GATE)}: a site, two counts and token ids.")
    if not {"gate.readers", "gate.thresholds"} <= set(tensors):
        raise ValueError(f"it lacks the tensors of its gate; {ADVICE}.")
    readers, limits = (_take(tensors, f"gate.{leaf}", torch.float32) for leaf in ("readers", "thresholds"))
    gate = Gate(ends, readers, limits, described["required"], described["pictured"])
    return {"gate": gate, "gate_site": _site(described["site"])}


def _read_sites(tensors: dict[str, torch.Tensor]) -> dict[Site, dict[str, Subspace]]:
    sites: dict[Site, dict[str, Subspace]] = {}
    for key in [key for key in tensors if key.startswith("sites.") and key.endswith(".basis")]:
        prefix = key.removesuffix(".basis")
        site, _, name = prefix.removeprefix("sites.").rpartition(".")
        basis, mean = (_take(tensors, f"{prefix}.{leaf}", torch.float32) for leaf in ("basis", "mean"))
        beta = _take(tensors, f"{prefix}.beta", torch.float64)
        if beta.ndim:
            raise ValueError(f"{prefix}.beta has the shape {tuple(beta.shape)}; expected a single number.")
        reader = _take(tensors, f"{prefix}.reader", torch.float32) if f"{prefix}.reader" in tensors else None
        try:
            sites.setdefault(_site(site), {})[name] = Subspace(basis, mean, float(beta), reader)
        except ValueError as error:
            raise ValueError(f"{prefix}: {error}") from error
    return sites


def _site(text: str) -> Site:
    site = Site.parse(text)
    if str(site) != text:
        raise ValueError(f"{text!r} is not a site as it is written in a file, {str(site)!r}.")
    return site
