"""Adapters of PEFT that live in a model's modules: taken along, written into config.json, made again, and merged."""

import importlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from .configuration_care import auto_class
from .repaired_module import CareSiteMixin, care_class

KINDS = ("LORA", "IA3", "LOHA", "LOKR", "HRA")  # nothing of them is outside the parameters of the adapted modules
# Other options of LoRA hook into the forward or change the base; what only initialises is left out of what is kept.
LORA_OPTIONS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("bias", "use_rslora", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "use_dora", "lora_bias", "target_parameters", "ensure_weight_tying", "runtime_config"),
}
INITIALISING = ("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
ADVICE = "merge it into the base first (`merge_and_unload()`), if it can be merged, and repair that"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, or that in a `PeftModel`, its adapters in place.

    Raises:
        TypeError: an adapter is not wholly in the model's modules (prompt learning, or another of PEFT's kinds).
    """
    peft = sys.modules.get("peft")  # without it there is no such model
    if peft is None:
        return model
    if isinstance(model, peft.PeftMixedModel):
        raise TypeError(f"A PeftMixedModel mixes kinds of adapters, which is not supported; {ADVICE}.")
    if not isinstance(model, peft.PeftModel):
        return model
    for name, config in model.peft_config.items():
        _check_kind(name, config)
    return model.get_base_model()


def _check_kind(name: str, config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in KINDS:
        raise TypeError(
            f"Adapter {name!r} is of the kind {kind}, which is not wholly in the model's modules, so a repair of the "
            f"base would lose it; supported are {', '.join(KINDS)}. Otherwise {ADVICE}."
        )
    if kind != "LORA":
        return
    default = type(config)().to_dict()
    given = config.to_dict()
    odd = sorted(k for k in given if k not in {*LORA_OPTIONS, *INITIALISING} and given[k] != default.get(k))
    if odd:
        raise TypeError(f"Adapter {name!r} uses {', '.join(odd)}, which is not supported under a repair; {ADVICE}.")


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by which PEFT replaced those of `model`, by name."""
    if sys.modules.get("peft") is None:
        return {}
    kinds = (
        importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer,
        importlib.import_module("peft.utils.other").AuxiliaryTrainingWrapper,
    )
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that the model runs with.

    Raises:
        ValueError: they differ among layers, are merged into the weights or are switched off.
    """
    found: dict[tuple[str, ...], str] = {}
    layers = adapter_layers(model)
    for name, layer in layers.items():
        if _merged_names(layer):
            raise ValueError(
                f"Adapters {_merged_names(layer)} are merged into the weights of {name}, but still there, so they "
                "would be applied twice; call `unmerge_adapter()`, or `merge_and_unload()`."
            )
        if not _auxiliary(layer):
            if layer.disable_adapters:
                raise ValueError(f"The adapters of {name} are switched off; switch them on, or `unload()` them.")
            found.setdefault(tuple(layer.active_adapters), name)
    if len(found) > 1:
        raise ValueError(f"Layers differ in their active adapters, {found}; call `set_adapter` once for all.")
    active = list(next(iter(found), ()))
    for name, layer in layers.items():
        if found and _auxiliary(layer) and _acting(layer) != [a for a in active if a in layer._adapters]:
            raise ValueError(f"{name} does not follow the active adapters, {active}; call `set_adapter` once for all.")
    return active


def _acting(layer: nn.Module) -> list[str]:
    """The active adapters of an auxiliary layer, which acts only if it has them all."""
    own = list(layer.active_adapters)
    return [] if layer.disable_adapters or set(own) - set(layer._adapters) else own


def _auxiliary(layer: nn.Module) -> bool:
    """Whether it is a module that is trained whole, or in part, beside the adapter."""
    return not hasattr(layer, "get_base_layer")


def describe_adapters(model: nn.Module, configs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `restore_adapters` needs, as arguments of `CareConfig`; empty if the model has no adapters.

    Args:
        model: the base.
        configs: PEFT's, by adapter; by default those that PEFT left on the model.

    Raises:
        TypeError: an adapter of an unsupported kind.
        ValueError: adapters are merged, switched off or changed, so that another model would come out.
    """
    layers = adapter_layers(model)
    if not layers:
        return {}
    configs = configs or getattr(model, "peft_config", None)
    if not configs:
        raise ValueError(f"{len(layers)} modules have adapters, but the model has no `peft_config` that tells which.")
    for name, config in configs.items():
        _check_kind(name, config)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for _, t in adapter_tensors(layers) if t.is_floating_point()})
    if len(dtypes) > 1:
        raise ValueError(f"The adapters are of dtypes {dtypes}; cast them to one.")
    described = {
        "adapters": {name: _as_json(config) for name, config in configs.items()},
        "active_adapters": active_adapters(model),
        "adapter_dtype": dtypes[0] if dtypes else None,
    }
    _check_restorable(model, layers, described)
    return described


def _as_json(config: Any) -> dict[str, Any]:
    plain = {k: v for k, v in config.to_dict().items() if k not in {*INITIALISING, "runtime_config"}}
    # Sets have no order of their own.
    return json.loads(json.dumps(plain, default=lambda v: sorted(v) if isinstance(v, (set, frozenset)) else v.value))


def adapter_tensors(layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that the adapters added."""
    others = ("base_layer.", "original_module.", "care.", "care_gate.")
    for name, layer in layers.items():
        for key, tensor in [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers()]:
            if not key.startswith(others):
                yield f"{name}.{key}", tensor


def _check_restorable(model: nn.Module, layers: Mapping[str, nn.Module], described: Mapping[str, Any]) -> None:
    """Assert that the description gives the adapters that there are, by doing it without any weights."""
    with torch.device("meta"), no_init_weights():
        other = auto_class(model.config).from_config(type(model.config).from_dict(model.config.to_dict()))
        restore_adapters(other, described["adapters"], described["active_adapters"])
    again = adapter_layers(other)
    shapes, expected = ({k: tuple(t.shape) for k, t in adapter_tensors(of)} for of in (again, layers))
    different = sorted(k for k in shapes.keys() | expected.keys() if shapes.get(k) != expected.get(k))
    different += sorted(
        name for name in layers.keys() & again.keys() if _settings(layers[name]) != _settings(again[name])
    )
    if different:
        raise ValueError(
            f"The configuration of adapters {sorted(described['adapters'])} does not tell all of them: "
            f"{len(different)} places differ ({', '.join(different[:3])}), of another shape, scale or name. Put scales "
            f"back and give `target_modules` by their last names, or {ADVICE}."
        )


def _settings(layer: nn.Module) -> dict[str, Any]:
    return {name: getattr(layer, name, None) for name in ("scaling", "fan_in_fan_out", "is_feedforward")}


def adapter_settings(model: nn.Module) -> list[Any]:
    """All that adapters do beside their tensors, as plain values; empty without adapters."""
    return [
        [name, str(_settings(layer)), list(layer.active_adapters), layer.disable_adapters, _merged_names(layer)]
        for name, layer in adapter_layers(model).items()
    ]


def _merged_names(layer: nn.Module) -> list[str]:
    return list(getattr(layer, "merged_adapters", ()))


def restore_adapters(model: nn.Module, adapters: Mapping[str, Mapping[str, Any]], active: Sequence[str]) -> None:
    """Put adapters, without their values, into `model`.

    Args:
        model: the base, without any.
        adapters: a `PeftConfig` as a dict, by name.
        active: the names of those that act.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: PEFT cannot read a configuration, or it fits no module.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(
            f"The checkpoint has adapters ({', '.join(adapters)}) and PEFT is not installed; `pip install peft`."
        ) from error
    for name, entry in adapters.items():
        try:
            config = peft.PeftConfig.from_peft_type(**entry)
            _check_kind(name, config)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # one adapter after another is meant
                peft.inject_adapter_in_model(config, model, name)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Adapter {name!r} cannot be put on {type(model).__name__}: {error}") from error
    _activate(model, active)
    if all(entry.get("inference_mode") for entry in adapters.values()):
        model.requires_grad_(False)


def _activate(model: nn.Module, active: Sequence[str]) -> None:
    for layer in adapter_layers(model).values():
        if not _auxiliary(layer):
            layer.set_adapter(list(active))
            continue
        own = [adapter for adapter in active if adapter in layer._adapters]
        layer.enable_adapters(bool(own))
        if own:
            layer.set_adapter(own)


def merge_adapters(model: nn.Module) -> None:
    """Fold the active adapters into the weights of `model` and take all of them out; repairs stay.

    Weights that change are copies, so that a model that shares them keeps its own.

    Raises:
        ValueError: there are no adapters, they are on offloaded or tied weights, or are merged or off.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ValueError("The model has no adapters to merge.")
    active_adapters(model)
    _check_mergeable(model, layers)
    for name, layer in layers.items():
        if any(name.startswith(f"{other}.") for other in layers):
            continue  # a part of another
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _merged(layer))
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in model.__dict__:
            delattr(model, attribute)


def _check_mergeable(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    for name, layer in layers.items():
        base = getattr(layer, "base_layer", None)
        for parameter in [] if base is None else base.parameters():
            if parameter.is_meta:
                raise ValueError(f"The weights of {name} are offloaded; load the model without offloading to merge.")
            tied = owners[id(parameter)]
            if len(tied) > 1:
                raise ValueError(
                    f"The adapter of {name} is on weights that are tied ({', '.join(sorted(tied))}), which merging "
                    "would part; load the base with tie_word_embeddings=False."
                )


def _merged(layer: nn.Module) -> nn.Module:
    """The module that `layer` stands for, its adapters folded in, and repaired as `layer` is."""
    inner = layer
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                copied = parameter.detach().clone()
                inner._parameters[name] = nn.Parameter(copied, requires_grad=parameter.requires_grad)
    if hasattr(layer, "unload_and_optionally_merge_module"):
        merged = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    else:
        layer.merge(safe_merge=True)
        merged = layer.get_base_layer()
    if isinstance(layer, CareSiteMixin):
        merged.__class__ = care_class(type(merged))
        merged.care, merged.care_gate = layer.care, layer.care_gate
        merged.care_state, merged.care_scope = layer.care_state, layer.care_scope
    return merged


# A repair that an adapter went around


def watch_places(model: nn.Module) -> None:
    """Have every forward of `model` assert that its repaired modules stand where they were put."""
    model.care_places = [name for name, module in model.named_modules() if isinstance(module, CareSiteMixin)]
    check_places(model)
    model.register_forward_pre_hook(_check_before)


def _check_before(model: nn.Module, args) -> None:
    check_places(model)


def check_places(model: nn.Module) -> None:
    """Assert that no adapter was put around a repaired module, for it would add what nothing repairs.

    Raises:
        ValueError: one was.
    """
    for place in model.care_places:
        module = model
        for name in place.split("."):
            module = getattr(module, name)
            if isinstance(module, CareSiteMixin):
                continue
            if "base_layer" in module._modules or "original_module" in module._modules:
                raise ValueError(
                    f"PEFT's {type(module).__name__} is around the repaired module {place}, or around one that holds "
                    "it, so that what it adds would not be repaired. Leave it out "
                    f"(exclude_modules=[{place!r}]), or merge it into the base and repair that."
                )
