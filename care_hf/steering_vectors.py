"""Vectors that are added to the residual stream: the steering itself, and a start for it from contrast sets."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .devices import input_device
from .samples import Sample, batches, collate
from .sites import Site, hidden_size, output_tensor, record, replace_output, site_module

FORMAT = "care_hf.steering.v1"


class SteeringVectors:
    """While entered, adds a vector to the residual stream of each of its layers: at every position of every forward.

    ``h <- h + v`` at prompt, image and answer tokens alike, as in training, so that prefill, cached decoding and any
    padding agree. The sum is taken in the wider of the two dtypes and returned in that of h.

    Args:
        model: a vision-language model, steered in place.
        vectors: by site of the residual stream, floating point (d,).
        settings: how they came about, plain values; saved along.

    Attributes:
        vectors: float32.

    Raises:
        ValueError: there are none; a site is not residual or not there; a vector is not finite or of another shape.
    """

    def __init__(
        self, model: nn.Module, vectors: Mapping[Site, torch.Tensor], settings: Mapping[str, Any] | None = None
    ):
        if not vectors:
            raise ValueError("`vectors` is empty; give at least one site and its vector.")
        size = hidden_size(model)
        for site, vector in vectors.items():
            if site.component != "residual":
                raise ValueError(
                    f"Site {site}: vectors are added to the residual stream; use the component 'residual'."
                )
            if vector.shape != (size,) or not vector.is_floating_point() or not torch.isfinite(vector.float()).all():
                raise ValueError(
                    f"The vector of site {site} must be finite, floating point and of shape ({size},); got "
                    f"{vector.dtype} {tuple(vector.shape)}. Train it again on this model."
                )
        self.modules = {site: site_module(model, site) for site in vectors}
        self.vectors = {site: vector.float() for site, vector in vectors.items()}
        self.settings = dict(settings or {})
        self._handles: list = []

    def __enter__(self) -> "SteeringVectors":
        if self._handles:
            raise RuntimeError("This steering is on already; leave it before entering it again.")
        for site, module in self.modules.items():
            self._handles.append(module.register_forward_hook(_adding(self.vectors[site])))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with one tensor per site, ``sites.3.residual.vector``."""
        tensors = {f"sites.{site}.vector": vector.detach().cpu().contiguous() for site, vector in self.vectors.items()}
        save_file(tensors, path, metadata={"format": FORMAT, "settings": json.dumps(self.settings)})

    @classmethod
    def load(cls, model: nn.Module, path: str | Path) -> "SteeringVectors":
        """Read what `save` wrote, to steer `model`.

        Raises:
            ValueError: the file is broken or of another format, or its vectors do not fit `model`.
        """
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or save it again.") from error
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} has the format {header.get('format')!r}; this version reads {FORMAT!r}.")
        try:
            names = {key: key.removeprefix("sites.").removesuffix(".vector") for key in tensors}
            vectors = {Site.parse(name): tensors[key].to(input_device(model)) for key, name in names.items()}
            if {f"sites.{site}.vector" for site in vectors} != set(tensors):
                raise ValueError(f"the tensors {sorted(tensors)} are not all named as vectors of sites.")
            return cls(model, dict(sorted(vectors.items())), json.loads(header.get("settings", "{}")))
        except ValueError as error:
            raise ValueError(f"{path} does not fit this {type(model).__name__}: {error}") from error


def _adding(vector: torch.Tensor):
    def hook(module: nn.Module, args, output):
        h = output_tensor(output)
        return replace_output(output, (h + vector.to(h.device)).to(h.dtype))

    return hook


def contrast_vectors(
    model,
    processor,
    contrasts: Sequence[tuple[Sequence, Sequence]],
    layers: Sequence[int],
    *,
    scale: float = 0.05,
    batch_size: int = 32,
) -> tuple[dict[Site, torch.Tensor], dict[Site, float]]:
    """One vector per layer from several contrast sets, ``v = scale * norm * mean_c(d_c / |d_c|)``.

    d_c is the mean activation of the last prompt token over the prompts to steer towards, minus that over those to
    steer away from. Every set counts the same, however far apart its means lie; where sets disagree the vector is
    shorter. `norm` is the mean norm of the same activations, every half of a set counting the same.

    Args:
        model: a vision-language model.
        processor: its processor.
        contrasts: pairs of prompts (anything with chat `messages`) to steer towards and away from, for example
            (refused, complied) and (malicious, benign): towards what is refused.
        layers: decoder layers, from 0.
        scale: how far, as a share of the mean norm of the residual stream there; 0 gives vectors of 0.
        batch_size: prompts per forward.

    Returns:
        The vectors, float32 (d,), and `norm`, by site of the residual stream.

    Raises:
        ValueError: there are no contrasts or layers, a layer comes twice, a side of a contrast is empty, its two means
            are the same, or `scale` is negative.
    """
    if not layers or len(set(layers)) < len(layers):
        raise ValueError(f"layers={list(layers)} must name at least one decoder layer, each once.")
    if not contrasts or not all(len(side) for contrast in contrasts for side in contrast):
        raise ValueError("`contrasts` needs at least one pair of sets of prompts, neither of them empty.")
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale={scale} must be a share of the residual stream's norm, 0 or more.")
    sites = [Site(layer, "residual") for layer in sorted(layers)]
    means = [[_last_token_means(model, processor, s, sites, batch_size) for s in contrast] for contrast in contrasts]
    vectors, norms = {}, {}
    for site in sites:
        differences = [towards[site][0] - away[site][0] for towards, away in means]
        for index, difference in enumerate(differences):
            if not difference.any():
                raise ValueError(f"`contrasts`[{index}]: both means at site {site} are the same; give other prompts.")
        direction = torch.stack([F.normalize(d, dim=0) for d in differences]).mean(dim=0)
        sides = [side[site][1] for contrast in means for side in contrast]
        norms[site] = sum(sides) / len(sides)
        vectors[site] = (scale * norms[site] * direction).float()
    return vectors, norms


@torch.no_grad()
def _last_token_means(model, processor, samples, sites, batch_size) -> dict[Site, tuple[torch.Tensor, float]]:
    """Mean of the last prompt token's activation, float64 (d,), and of its norm."""
    sums = {site: [torch.zeros(hidden_size(model), dtype=torch.float64), 0.0] for site in sites}
    progress = logging.tqdm(total=len(samples), desc="Reading contrasts", unit="prompt", leave=False)
    for part in batches(samples, batch_size):
        inputs = collate(processor, [Sample(s.messages) for s in part], (), padding_side="right").inputs
        last = inputs["attention_mask"].sum(dim=1) - 1
        with record(model, sites) as activations:
            model(**{name: value.to(input_device(model)) for name, value in inputs.items()}, use_cache=False)
        for site in sites:
            h = activations[site][torch.arange(len(part)), last.to(activations[site].device)].cpu().double()
            sums[site][0] += h.sum(dim=0)
            sums[site][1] += torch.linalg.vector_norm(h, dim=-1).sum().item()
        progress.update(len(part))
    progress.close()
    return {site: (total / len(samples), norm / len(samples)) for site, (total, norm) in sums.items()}
