"""From a base and its subspaces to the configuration and the modules of the repaired model, checked beforehand."""

from collections.abc import Sequence

from transformers import PreTrainedConfig, PreTrainedModel

from .adapters import adapter_layers, adapter_tensors, describe_adapters
from .configuration_care import CareConfig, auto_class
from .gating import Gate, TurnProjection
from .projection import SafetyProjection
from .quantised import in_repaired
from .sites import Site, hidden_size, site_module


def check_base(model: PreTrainedModel, subspaces) -> None:
    """Assert that `subspaces`, a `SafetySubspaces`, can repair `model`, and that it could be loaded again.

    Raises:
        TypeError: no Auto class loads a model of this class.
        ValueError: no sites, a site that the model does not have, or bases or a gate of another hidden size or
            tokenizer.
    """
    if not subspaces.sites:
        raise ValueError("There are no sites to repair; give at least one.")
    _check_class(model)
    _check_sizes(model, subspaces)


def _check_class(model: PreTrainedModel) -> None:
    """Assert that what is loaded from a repaired checkpoint would be the model that was repaired."""
    auto = auto_class(model.config)
    expected = auto._model_mapping[type(model.config)]
    expected = expected if isinstance(expected, tuple) else (expected,)
    if not isinstance(model, expected):
        raise TypeError(
            f"A {type(model).__name__} cannot be repaired: loaded again, it would be a {expected[0].__name__}; load "
            f"the base with {auto.__name__}."
        )


def _check_sizes(model: PreTrainedModel, subspaces) -> None:
    dimension = hidden_size(model)
    parts = [
        (f"{name} basis of site {site}", subspace.basis.shape[0], site)
        for site, by_group in subspaces.sites.items()
        for name, subspace in by_group.items()
    ]
    if subspaces.gate:
        parts.append(("gate", subspaces.gate.readers.shape[0], subspaces.gate_site))
    for what, size, site in parts:
        if size != dimension:
            raise ValueError(
                f"The {what} has d={size}, but {type(model).__name__} has a hidden size of {dimension}; it was fitted "
                "on another model."
            )
        site_module(model, site)  # raises where there is none
    check_prompt_end(model, subspaces.gate)


def check_prompt_end(model: PreTrainedModel, gate: Gate | None) -> None:
    """Assert that prompts of the model can end as the gate expects, for it would never fire otherwise."""
    if gate is not None:
        check_vocabulary(gate.prompt_end, model.get_input_embeddings().num_embeddings, type(model).__name__)


def check_vocabulary(prompt_end: Sequence[int], known: int, name: str) -> None:
    """Assert that a model with that name and so many tokens knows the ids that end a prompt.

    Raises:
        ValueError: it does not.
    """
    if max(prompt_end) >= known:
        raise ValueError(
            f"The gate waits for prompt_end={tuple(prompt_end)}, but {name} has {known} tokens; it was fitted with "
            "another tokenizer."
        )


def configuration(model: PreTrainedModel, vlm_config: PreTrainedConfig, subspaces) -> CareConfig:
    """That of `model` repaired by `subspaces`; `vlm_config` is the base's own, which it then holds."""
    sites = [
        {
            "site": str(site),
            "ranks": {name: s.rank for name, s in by_group.items()},
            "oblique": [name for name, s in by_group.items() if s.reader is not None],
            "steps": max(s.steps for s in by_group.values()),
        }
        for site, by_group in sorted(subspaces.sites.items())
    ]
    gate = subspaces.gate and {
        "site": str(subspaces.gate_site),
        "required": subspaces.gate.required,
        "alarms": subspaces.gate.alarms,
        "pictured": subspaces.gate.pictured,
        "prompt_end": list(subspaces.gate.prompt_end),
    }
    config = CareConfig(
        vlm_config,
        sites,
        subspaces.fusion,
        gate,
        subspaces.scope,
        dict(subspaces.metadata),
        **describe_adapters(model),
        dtype=model.dtype,
    )
    own = (name for layer in adapter_layers(model).values() for name, _ in adapter_tensors({"": layer}))
    quantization = in_repaired(model, own)
    if quantization is not None:
        config.quantization_config = quantization
    return config


def projection(subspaces, site: Site) -> SafetyProjection | TurnProjection:
    """What repairs `site`, on the device of its subspaces."""
    by_group = subspaces.sites[site]
    if set(by_group) <= {"visual", "text"}:
        return SafetyProjection.from_subspaces(by_group, subspaces.fusion, subspaces.fusion_weight, subspaces.strength)
    return TurnProjection.from_subspaces(by_group, subspaces.strength)
