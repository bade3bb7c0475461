"""Which base a repair is for: told by its shape and by some values of each weight, whatever its dtype, device or names.

Modules are renamed from one version of transformers to the next, so weights are known by shape and values: a weight is
there if one of its shape has its values. Casting is deterministic: two dtypes are compared in the coarser one, where a
checkpoint that was cast is equal and another one is not. Quantised weights are not compared, since how they are rounded
hides a fine-tuning; what quantisation leaves alone (norms, embeddings, heads, biases) is.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .sites import decoder_layers, hidden_size

SAMPLES = 32  # values of each weight
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FACTS = {"model_type": "family", "hidden_size": "hidden size", "layers": "decoder layers", "vocabulary": "tokens"}
HALF_STEP = 2**-7  # relative, where neither of float16 and bfloat16 holds the other: one unit of the coarser


def describe(base: nn.Module) -> tuple[dict[str, Any], torch.Tensor]:
    """What is kept of a base.

    Args:
        base: the model without its repair, on any device, offloaded or quantised.

    Returns:
        ``(facts, values)``: plain values, with the name, shape and dtype of the n weights that can be read; and float32
        (n, 32), values of each.
    """
    weights = list(_weights(base))
    facts = {
        "name": _name(base),
        **_facts(base),
        "weights": [[name, list(shape), str(dtype).removeprefix("torch.")] for name, shape, dtype, _ in weights],
        "unread": sum(1 for _ in base.parameters()) - len(weights),
    }
    return facts, torch.stack([values for *_, values in weights]) if weights else torch.empty(0, SAMPLES)


def _name(base: nn.Module) -> str:
    """Its name on the Hub; of a folder the last part, for where it was is nobody's business."""
    name = str(getattr(base.config, "_name_or_path", "") or "")
    local = Path(name).is_absolute() or Path(name).exists() or name.startswith((".", "~"))
    return Path(name).name if local else name


def _facts(base: nn.Module) -> dict[str, Any]:
    return {
        "model_type": base.config.model_type,
        "hidden_size": hidden_size(base),
        "layers": len(decoder_layers(base)),
        "vocabulary": base.get_input_embeddings().num_embeddings,
    }


def _weights(base: nn.Module) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, torch.Tensor]]:
    """Name, shape, dtype and sampled values of each weight that can be read as it is."""
    seen: set[int] = set()
    for prefix, module in base.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            tensor = _loaded(module, leaf, parameter.detach())
            if type(tensor) is torch.Tensor and tensor.dtype in PLAIN and not tensor.is_meta and tensor.numel():
                name = f"{prefix}.{leaf}" if prefix else leaf
                yield name, tuple(tensor.shape), tensor.dtype, _sample(tensor)


def _loaded(module: nn.Module, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, from where accelerate offloaded it if it did."""
    if not tensor.is_meta:
        return tensor
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        stored = getattr(part, "weights_map", None)
        if stored is not None and leaf in stored:
            return stored[leaf].detach()
    return tensor


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    last = tensor.numel() - 1
    places = torch.tensor([last * i // (SAMPLES - 1) for i in range(SAMPLES)], device=tensor.device)
    whole = tensor if tensor.ndim else tensor[None]
    return whole[torch.unravel_index(places, whole.shape)].float().cpu()


def compare(facts: Mapping[str, Any], values: torch.Tensor, base: nn.Module) -> str:
    """Assert that `base` is the one that `describe` was given.

    Returns:
        How sure that is: "exact", "in bfloat16", "in bfloat16; 12 of 98 weights, for 86 are quantised or elsewhere".

    Raises:
        ValueError: it is another, or cannot be told; the message says in what it differs. Or the description is broken.
    """
    stored = _parse(facts, values)
    own = _facts(base)
    differing = [
        f"{what} {own[key]!r}, not {facts.get(key)!r}" for key, what in FACTS.items() if own[key] != facts.get(key)
    ]
    if differing:
        raise ValueError(f"it is for {_called(facts)}, and this one has {', '.join(differing)}")
    found = list(_weights(base))
    unread = sum(1 for _ in base.parameters()) - len(found)
    if not found or not stored:
        raise ValueError(f"it is for {_called(facts)}, and none of the weights of this one can be compared")
    # A weight that one of them has quantised is missing there, so only what the other has must be found.
    lacking = [] if unread else _unmatched(stored, found)
    if not facts["unread"]:
        lacking += _unmatched(found, stored)
    elif unread:  # both are quantised, maybe not in the same places
        shapes = {shape for _, shape, *_ in stored}
        lacking = _unmatched([weight for weight in found if weight[1] in shapes], stored)
    if lacking:
        raise ValueError(
            f"it is for {_called(facts)}, and weights of this one differ ({len(set(lacking))} of them, {lacking[0]} "
            "first), as after a fine-tuning or with other adapters"
        )
    return _sureness(stored, found, unread + facts["unread"])


def main_dtype(facts: Mapping[str, Any], values: torch.Tensor) -> torch.dtype | None:
    """The dtype of most of what `describe` read of a base; None if that was nothing.

    Raises:
        ValueError: the description is broken.
    """
    sizes: Counter[torch.dtype] = Counter()
    for _, shape, dtype, _ in _parse(facts, values):
        sizes[dtype] += math.prod(shape)
    return sizes.most_common(1)[0][0] if sizes else None


def _called(facts: Mapping[str, Any]) -> str:
    return repr(facts.get("name") or f"another {facts.get('model_type')}")


def _parse(facts: Mapping[str, Any], values: torch.Tensor) -> list[tuple]:
    names = {str(dtype).removeprefix("torch."): dtype for dtype in PLAIN}
    try:
        weights = [(str(name), tuple(map(int, shape)), names[dtype]) for name, shape, dtype in facts["weights"]]
        whole = type(facts["unread"]) is int and values.shape == (len(weights), SAMPLES)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"what it says of its base cannot be read ({error!r})") from error
    if not whole:
        raise ValueError(f"it has values of shape {tuple(values.shape)} for {len(weights)} weights of its base")
    return [(*weight, sample) for weight, sample in zip(weights, values, strict=True)]


def _unmatched(weights: list[tuple], others: list[tuple]) -> list[str]:
    """The names of `weights` of which none of `others` has the shape and values."""
    pools: dict[tuple, list[torch.Tensor]] = {}
    for _, shape, dtype, sample in others:
        pools.setdefault((shape, dtype), []).append(sample)
    stacked = {key: torch.stack(samples) for key, samples in pools.items()}
    return [
        name
        for name, shape, dtype, sample in weights
        if not any((shape, d) in stacked and _same(sample, dtype, stacked[shape, d], d) for d in PLAIN)
    ]


def _same(sample: torch.Tensor, dtype: torch.dtype, pool: torch.Tensor, other: torch.dtype) -> bool:
    """Whether one of the rows of `pool` holds the values of `sample`, in the coarser of the two dtypes."""
    coarse = _coarser(dtype, other)
    a, b = sample.to(coarse).float(), pool.to(coarse).float()
    equal = a == b
    if {dtype, other} == {torch.float16, torch.bfloat16}:
        equal |= (a - b).abs() <= HALF_STEP * torch.maximum(a.abs(), b.abs()) + 1e-7  # float16 ends at 6e-8
    return bool(equal.all(dim=1).any())


def _coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if torch.bfloat16 in (one, other) else max(one, other, key=PLAIN.index)


def _sureness(stored: list[tuple], found: list[tuple], unread: int) -> str:
    one, other = {dtype for *_, dtype, _ in stored}, {dtype for *_, dtype, _ in found}
    said = "exact" if one == other else f"in {str(functools.reduce(_coarser, one | other)).removeprefix('torch.')}"
    compared = min(len(stored), len(found))
    if not unread:
        return said
    return f"{said}; {compared} of {compared + unread} weights, for {unread} are quantised or elsewhere"
