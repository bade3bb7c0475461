"""The repair in a checkpoint's files, by place, without a model to load them into."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .configuration_care import CareConfig, auto_class
from .gating import Gate, GateReader, TurnProjection
from .loading import check_keys, of_the_repair
from .projection import MODALITIES, SafetyProjection
from .repairing import check_vocabulary
from .sites import ATTENTION_NAMES, FFN_NAMES, PLACES, Site, check_depth
from .subspace import SafetySubspaces

SITE, GATE = ".care.", ".care_gate."  # between a module's name and that of a tensor of its repair
NORMED_ATTENTION = "input_layernorm"  # of layers that norm what attention adds by a norm of that name


def repair_of(
    config: CareConfig, headers: Mapping[str, Mapping[str, Any]], files: Any
) -> tuple[SafetySubspaces, dict[str, dict[str, torch.Tensor]]]:
    """Read the repair of a checkpoint, and assert of it what loading does.

    Args:
        config: of the checkpoint.
        headers: what each of its files holds, by name a `tensor_files.Stored`.
        files: `tensor_files.LocalFiles` or `HubFiles`.

    Returns:
        ``(subspaces, tensors)``: the repair, and its tensors by place ("sites.16.ffn", "gate") and name ("text.basis").

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or holds what it cannot; or the base has no such
            layer or token.
    """
    parts = _parts(config)
    held = {key: stored for header in headers.values() for key, stored in header.items()}
    keys = {
        place: {leaf: f"{prefix}{leaf}" for leaf in _shapes(parts[place])} for place, prefix in _found(config, held)
    }
    _check_keys(parts, keys, held)
    if not config.sites:
        raise ValueError("config.json names no sites, so nothing is repaired.")
    read = {}
    for name, header in headers.items():
        own = [key for key in header if of_the_repair(key)]
        read |= files.tensors(name, own) if own else {}
    read = {key: t.float() if t.is_floating_point() else t.long() for key, t in read.items()}
    tensors = {place: {leaf: read[key] for leaf, key in named.items()} for place, named in keys.items()}
    for place, part in parts.items():
        part.load_state_dict(tensors[place], assign=True)
        where = "The gate" if place == "gate" else f"Site {place.removeprefix('sites.')}"
        try:
            part.check()
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    _check_layers(config, read["layers"])
    return _subspaces(config, parts), tensors


def base_class(config: CareConfig) -> str:
    """The name of the base's class.

    Raises:
        TypeError: no Auto class knows it.
    """
    base = config.vlm_config
    if base.architectures:
        return base.architectures[0]
    return auto_class(base)._model_mapping[type(base)].__name__  # of a base that was never saved by itself


def _parts(config: CareConfig) -> dict[str, nn.Module]:
    """The modules that the configuration says, without memory for their buffers."""
    text = config.get_text_config()
    named = getattr(config.vlm_config, PLACES, None)
    parts: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for entry in config.sites:
            if not named:
                check_depth(Site.parse(entry["site"]), text.num_hidden_layers)
            sizes, oblique = (text.hidden_size, entry["ranks"]), entry["oblique"]
            if set(entry["ranks"]) <= set(MODALITIES):
                parts[f"sites.{entry['site']}"] = SafetyProjection(*sizes, config.fusion, oblique)
            else:
                parts[f"sites.{entry['site']}"] = TurnProjection(*sizes, entry["steps"], oblique)
        if config.gate:
            gate = config.gate
            check_vocabulary(gate["prompt_end"], text.vocab_size, base_class(config))
            parts["gate"] = GateReader(text.hidden_size, gate["required"], gate["alarms"], gate["pictured"])
    return parts


def _shapes(part: nn.Module) -> dict[str, tuple[int, ...]]:
    return {leaf: tuple(buffer.shape) for leaf, buffer in part.named_buffers()}


def _found(config: CareConfig, held: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Places, and what the names of their tensors begin with."""
    held, named = list(held), getattr(config.vlm_config, PLACES, None) or {}
    wanted = [(SITE, [Site.parse(entry["site"]) for entry in config.sites])]
    wanted += [(GATE, [Site.parse(config.gate["site"])])] if config.gate else []
    for marker, sites in wanted:
        by_layer: dict[int, dict[str, str]] = {}
        for module in sorted({key.partition(marker)[0] for key in held if marker in key}):
            layer, path = _split(module, named.get("layers"))
            by_layer.setdefault(layer, {}).setdefault(path, module)
        for site in sites:
            module = _module_of(site, sites, by_layer.get(site.layer, {}), named)
            if module is not None:
                yield ("gate" if marker == GATE else f"sites.{site}"), f"{module}{marker}"


def _split(module: str, layers: str | None) -> tuple[int, str]:
    """The decoder layer of a module, -1 if its name has none, and its path from there.

    Families are renamed where their layers are, never in the layers: so only what follows a layer's number counts.
    """
    if layers and f".{layers}." in f".{module}":
        number, _, path = f".{module}".rpartition(f".{layers}.")[2].partition(".")
        return (int(number) if number.isdecimal() else -1), path
    parts = module.split(".")
    place = max((i for i, part in enumerate(parts) if part.isdecimal()), default=None)
    return (-1, module) if place is None else (int(parts[place]), ".".join(parts[place + 1 :]))


def _module_of(site: Site, sites: Iterable[Site], paths: Mapping[str, str], named: Mapping[str, Any]) -> str | None:
    """Which of the modules of a layer, by path, is that of `site`."""
    if site.component == "residual":
        return paths.get("")
    inside = {path: module for path, module in paths.items() if path}
    if len([other for other in sites if other.layer == site.layer and other.component != "residual"]) == 1:
        return next(iter(inside.values()), None)
    of_ffn = [path for path in inside if path == named.get("ffn") or path in FFN_NAMES]
    of_ffn = of_ffn or [path for path in inside if path not in ATTENTION_NAMES and path != NORMED_ATTENTION]
    chosen = of_ffn if site.component == "ffn" else [path for path in inside if path not in of_ffn]
    return inside[chosen[0]] if chosen else None


def _check_keys(parts: Mapping[str, nn.Module], keys: Mapping[str, Mapping[str, str]], held: Mapping[str, Any]) -> None:
    expected, missing = {"layers"}, [] if "layers" in held else ["layers"]
    reshaped = []
    for place, part in parts.items():
        for leaf, shape in _shapes(part).items():
            key = keys.get(place, {}).get(leaf)
            if key is None or key not in held:
                missing.append(key or f"{place}.{leaf}")
                continue
            expected.add(key)
            if held[key].shape != shape:
                reshaped.append(key)
    unexpected = [key for key in held if of_the_repair(key) and key not in expected]
    check_keys({"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": reshaped}, ())


def _check_layers(config: CareConfig, layers: torch.Tensor) -> None:
    named = sorted({Site.parse(entry["site"]).layer for entry in config.sites})
    if layers.tolist() != named:
        raise ValueError(f"The buffer `layers` is {layers.tolist()}, but config.json names sites in {named}.")


def _subspaces(config: CareConfig, parts: Mapping[str, nn.Module]) -> SafetySubspaces:
    at = {Site.parse(key.removeprefix("sites.")): part for key, part in parts.items() if key != "gate"}
    first, gate = next(iter(at.values())), None
    if config.gate:
        reader = parts["gate"]
        counts = (config.gate["required"], config.gate["pictured"])
        gate = Gate(config.gate["prompt_end"], reader.readers, reader.thresholds, *counts)
    return SafetySubspaces(
        {site: part.subspaces() for site, part in at.items()},
        config.fusion,
        float(getattr(first, "fusion_weight", 0.5)),
        float(first.strength),
        config.origin,
        gate,
        Site.parse(config.gate["site"]) if config.gate else None,
        config.scope,
    )
