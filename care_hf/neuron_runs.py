"""Read and replace the hidden units of feed-forward networks, and differentiate by them: what ranks neurons."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers.utils import logging

from .contrasts import Contrast
from .devices import input_device, is_shared_out
from .samples import Samples, batches, collate
from .sites import FFN_NAMES, decoder_layers, hidden_size, image_token_ids

BLOCK_NAMES = tuple(name for name in FFN_NAMES if not name.endswith("layernorm"))
DOWN_NAMES = ("down_proj", "fc2", "w2", "dense_4h_to_h", "c_proj", "fc_out", "wo")

Unit = tuple[int, int]  # layer, unit
References = Mapping[int, torch.Tensor]  # (units,), or () for all, by layer
# Takes a layer and its units, (B, S, units) or (B * S, units), and may return others.
Use = Callable[[int, torch.Tensor], torch.Tensor | None]


def down_projection(model: nn.Module, layer: int) -> nn.Module:
    """The linear module of `layer`'s FFN whose inputs are its hidden units and whose output is of the hidden size.

    Any module with `in_features` and `out_features` counts as linear: those of quantised models are of many classes.

    Raises:
        ValueError: the model has no such layer, or its FFN no single such module, as a mixture of experts.
    """
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer={layer}: the model has {len(layers)} decoder layers (0 to {len(layers) - 1}).")
    block = next((b for name in BLOCK_NAMES if isinstance(b := getattr(layers[layer], name, None), nn.Module)), None)
    if block is None:
        raise ValueError(f"Layer {layer}, a {type(layers[layer]).__name__}, has none of {BLOCK_NAMES}; leave it out.")
    # In OPT's layers what would be the block is the down projection itself.
    for module in (block, *(getattr(block, name, None) for name in DOWN_NAMES)):
        if hasattr(module, "in_features") and getattr(module, "out_features", None) == hidden_size(model):
            return module
    raise ValueError(
        f"The FFN of layer {layer}, a {type(block).__name__}, has no single down projection (one of {DOWN_NAMES}); "
        "neurons of experts are not supported. Pass `layers=` with the dense layers."
    )


class UnitShare:
    """The units of one down projection that are in this process: all, or under tensor parallelism a part."""

    def __init__(self, projection: nn.Module):
        self.units, self.mesh = projection.in_features, None
        self.start, self.count = 0, self.units
        weight = getattr(projection, "weight", None)
        if is_shared_out(weight) and [placement.is_shard(1) for placement in weight.placements] == [True]:
            self.mesh = weight.device_mesh
            self.count = weight.to_local().shape[1]
            most = -(-self.units // self.mesh.size())  # how DTensors are cut: the last parts may be shorter
            self.start = min(self.mesh.get_local_rank() * most, self.units)

    def check(self, layer: int, a: torch.Tensor) -> None:
        """Assert that these are the units of `layer` that are here.

        Raises:
            ValueError: there are more or fewer.
        """
        if a.shape[-1] != self.count:
            raise ValueError(
                f"Layer {layer} has {a.shape[-1]} of its {self.units} FFN units in this process, not the {self.count} "
                "that its weight tells of; load the model without sharing it out in that way (device_map='auto', if "
                "one device does not hold it)."
            )

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """Of values of all units, (units,) or () for all of them, those that are here."""
        return values.expand(self.units)[self.start : self.start + self.count]

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """Values (units,) of all units, on the CPU, of those that are here, (count,)."""
        if self.mesh is None:
            return values
        from torch.distributed.tensor import DTensor, Shard

        local = values.to(self.mesh.device_type)
        shared = DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=(self.units,), stride=(1,))
        return shared.full_tensor().cpu()


class UnitRuns:
    """Forwards of one model that read or replace the units of some of its layers."""

    def __init__(self, model: nn.Module, processor, layers: Sequence[int], batch_size: int):
        self.model, self.processor, self.layers, self.batch_size = model, processor, layers, batch_size
        self.shares = {layer: UnitShare(down_projection(model, layer)) for layer in layers}

    @torch.no_grad()
    def means(self, prompts: Samples) -> References:
        """The mean of every unit over all prompt tokens, padding excluded; float64 (units,) on the CPU."""
        sums, count = dict.fromkeys(self.layers, 0.0), 0  # of the units that are here
        for inputs, mask in self._inputs(prompts, "Benign means"):

            def add(layer, a, mask=mask):
                sums[layer] = sums[layer] + _wide(a.reshape(*mask.shape, -1)[mask.to(a.device)]).sum(0).cpu().double()

            self._logits(inputs, add)
            count += int(mask.sum())
        return {layer: self.shares[layer].whole(total / count) for layer, total in sums.items()}

    @torch.enable_grad()
    def estimates(self, prompts: Samples, contrast: Contrast, references: References):
        """All units' mean effects to first order, float32 (units,) by layer, and the mean outcome."""
        totals, outcomes = dict.fromkeys(self.layers, 0.0), []
        for inputs, mask in self._inputs(prompts, "Attribution patching"):

            def add(layer, a, gradient, mask=mask):
                change = (self.shares[layer].own(references[layer]).to(_wide(a)) - _wide(a)) * _wide(gradient)
                # Padding has no gradient, but where nothing may be attended to its values need not be finite.
                change = change.reshape(*mask.shape, -1).masked_fill(~mask.to(a.device)[..., None], 0)
                totals[layer] = totals[layer] + change.sum((0, 1)).cpu().double()

            def follow(layer, a, add=add):
                # No parameter has a gradient: the graph begins at the first of the layers.
                a = a if a.requires_grad else a.detach().requires_grad_()
                a.register_hook(partial(add, layer, a.detach()))
                return a

            outcome = contrast.log_odds(self._logits(inputs, follow))
            _check_finite(outcome, sum(map(len, outcomes)))
            outcome.sum().backward()
            outcomes.append(outcome.detach().cpu().double())
        n = len(prompts)
        whole = {layer: self.shares[layer].whole(total / n).float() for layer, total in totals.items()}
        return whole, float(torch.cat(outcomes).mean())

    @torch.no_grad()
    def effects(self, prompts: Samples, contrast: Contrast, references: References, units: Sequence[Unit]):
        """The effects of really ablating `units` one by one, float64 (len(units), n), in each prompt."""
        columns = []
        for inputs, mask in self._inputs(prompts, "Ablating"):
            # Rows of one forward are copies of the batch, in each of which another unit is ablated, in the first none.
            # The last forward is filled up: in one of another shape rounding would be another.
            slots = [None, *units]
            copies = min(len(slots), max(1, self.batch_size // len(mask)))
            slots += [None] * (-len(slots) % copies)
            # Whatever a processor gives, images and patches too, are the prompts' one after another.
            tiled = {name: value.repeat(copies, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
            found = [
                contrast.log_odds(self._logits(tiled, _ablation(part, mask, references, self.shares)))
                for part in batches(slots, copies)
            ]
            found = torch.cat(found).cpu().double().reshape(-1, len(mask))
            columns.append(found[1 : len(units) + 1] - found[0])
        return torch.cat(columns, dim=1)

    def _inputs(self, prompts: Samples, title: str) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Left-padded batches on the model's device, and which of their tokens are no padding, bool (B, S)."""
        parts = batches(prompts, self.batch_size)
        total = math.ceil(len(prompts) / self.batch_size)
        for part in logging.tqdm(parts, desc=title, total=total, unit="batch", leave=False):
            inputs = collate(self.processor, part, image_token_ids(self.model.config)).inputs
            inputs = {name: value.to(input_device(self.model)) for name, value in inputs.items()}
            yield inputs, inputs["attention_mask"].bool()

    def _logits(self, inputs, use) -> torch.Tensor:
        def checked(layer, a):
            self.shares[layer].check(layer, a)
            return use(layer, a)

        with _hidden_units(self.model, self.layers, checked) as seen:
            logits = self.model(**inputs, use_cache=False).logits[:, -1]
        idle = sorted(set(self.layers) - seen)
        if idle:
            raise ValueError(f"The layers {idle} did not run on these prompts; pass `layers=` without them.")
        return logits


@contextmanager
def _hidden_units(model: nn.Module, layers: Sequence[int], use: Use) -> Iterator[set[int]]:
    """While entered, `use` sees the units of `layers` in every forward; yields the layers that have run."""
    seen: set[int] = set()

    def hook(layer):
        def change(module, args):
            seen.add(layer)
            changed = use(layer, args[0])
            return None if changed is None else (changed, *args[1:])

        return change

    handles = []
    try:
        for layer in layers:
            handles.append(down_projection(model, layer).register_forward_pre_hook(hook(layer)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _ablation(
    units: Sequence[Unit | None], mask: torch.Tensor, references: References, shares: Mapping[int, UnitShare]
) -> Use:
    """Ablates `units`, each in its own copy of the batch, at the tokens of `mask`, bool (B, S)."""

    def ablate(layer, a):
        rows = [(row, unit) for row, unit in enumerate(units) if unit is not None and unit[0] == layer]
        if not rows:
            return None
        changed = a.reshape(len(units), *mask.shape, -1).clone()
        share = shares[layer]
        reference = share.own(references[layer]).to(a)
        for row, (_, unit) in rows:
            here = unit - share.start
            if 0 <= here < share.count:
                changed[row, ..., here].masked_fill_(mask.to(a.device), reference[here])
        return changed.reshape(a.shape)

    return ablate


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_finite(outcome: torch.Tensor, before: int) -> None:
    wrong = (~outcome.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"The log-odds of refusal of `malicious`[{before + wrong[0]}] are {outcome[wrong[0]].item()}; they must be "
            "finite. Load the model in bfloat16 or float32, and check its weights."
        )
