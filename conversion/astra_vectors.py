"""ASTRA's published steering vectors to the steering of `care_hf.rivals.AstraSteering`, and back.

The code of ASTRA (arXiv 2411.16721) keeps two files of torch.save: activations to steer along (activations/*/jb/*.pt,
activations/*/toxic/*.pt) and calibration activations (activations/*/reference/reference_activations.pt). Each is
{sample: {layer: [activation (d,), ...]}}; the vector v and h0 are the means over all samples and lists of one layer.
Its --steer_layer L, from 1, is the output of decoder layer L - 1 counted from 0: L = 20 is the site 19.residual.

One safetensors file comes out, with sites.19.residual.vector and sites.19.residual.h0; `load` makes an `AstraSteering`
of it. alpha, how far to steer, is in neither format.

In: exact up to rounding; the means are taken in float64 here, in half precision there. For several prompts at once the
published code divides by norms over the whole batch, `AstraSteering` by those of each prompt: the same for one prompt.
Out: exact, as one sample with one activation per file.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safe_files import check_vectors, load_pickle, load_safetensors, run, save_safetensors, whole

from care_hf.rivals import AstraSteering
from care_hf.sites import Site

FORMAT = "care_hf.astra.v1"


def mean_activation(path: str | Path, layer: int) -> torch.Tensor:
    """The mean of a published file's activations of one layer, float32 (d,).

    Raises:
        ValueError: the file is of another form, or has nothing of that layer.
    """
    samples = load_pickle(path)
    if not isinstance(samples, dict) or not all(isinstance(by_layer, dict) for by_layer in samples.values()):
        raise ValueError(
            f"{path} holds a {type(samples).__name__}; expected ASTRA's {{sample: {{layer: [activation, ...]}}}}."
        )
    rows = {}
    for sample, by_layer in samples.items():
        activations = by_layer.get(layer, [])
        if not isinstance(activations, list) or not all(isinstance(a, torch.Tensor) for a in activations):
            raise ValueError(f"{path}: layer {layer} of sample {sample!r} is not a list of tensors, as ASTRA saves.")
        rows |= {(sample, index): activation for index, activation in enumerate(activations)}
    if not rows:
        known = sorted({key for by_layer in samples.values() for key in by_layer}, key=str)
        raise ValueError(f"{path} has nothing of layer {layer}; choose --layer from {known}.")
    check_vectors(rows, "activation", path)
    return torch.stack([row.double() for row in rows.values()]).mean(dim=0).float()


def from_astra(vectors: str | Path, reference: str | Path, layer: int, out: str | Path) -> Site:
    """Write the steering of two published files; see the module.

    Args:
        vectors: the file of the activations to steer along.
        reference: the file of the calibration activations.
        layer: ASTRA's, from 1.
        out: the safetensors file to write.

    Raises:
        ValueError: a file is of another form, the two differ in size, or v is 0.
    """
    if layer < 1:
        raise ValueError(f"layer={layer} must be 1 or more: ASTRA counts layers from 1, and 0 is the embeddings.")
    site = Site(layer - 1, "residual")
    parts = {"vector": mean_activation(vectors, layer), "h0": mean_activation(reference, layer)}
    if parts["vector"].shape != parts["h0"].shape:
        raise ValueError(
            f"{vectors} has d={len(parts['vector'])} and {reference} d={len(parts['h0'])}; give files of one model."
        )
    if not parts["vector"].any():
        raise ValueError(f"{vectors}: the mean of layer {layer} is 0, which has no direction to steer along.")
    origin = {"vectors": Path(vectors).name, "reference": Path(reference).name, "layer": layer}
    tensors = {f"sites.{site}.{name}": tensor for name, tensor in parts.items()}
    save_safetensors(out, tensors, {"format": FORMAT, "origin": json.dumps(origin)})
    return site


def read(path: str | Path) -> tuple[Site, torch.Tensor, torch.Tensor]:
    """Site, v and h0 of what `from_astra` wrote.

    Raises:
        ValueError: the file is of another format.
    """
    tensors, metadata = load_safetensors(path)
    names = sorted(tensors)
    if metadata.get("format") != FORMAT or [name.rpartition(".")[2] for name in names] != ["h0", "vector"]:
        raise ValueError(
            f"{path} has the format {metadata.get('format')!r} and the tensors {names}; expected {FORMAT!r} with a "
            "vector and an h0, as this script writes. Vectors that are merely added are no steering of ASTRA's: it "
            "depends on the activation."
        )
    site = Site.parse(names[0].removeprefix("sites.").removesuffix(".h0"))
    check_vectors(tensors, "tensor", path)
    return site, tensors[f"sites.{site}.vector"], tensors[f"sites.{site}.h0"]


def load(model, path: str | Path, alpha: float) -> AstraSteering:
    """The steering of `model` that `from_astra` wrote; alpha is the paper's, 5 to 10.

    Raises:
        ValueError: the file is of another format, or does not fit the model.
    """
    site, vector, h0 = read(path)
    return AstraSteering(model, site, vector, h0, alpha)


def to_astra(path: str | Path, vectors: str | Path, reference: str | Path) -> int:
    """Write the two files that the published scripts read; returns the --steer_layer to give them."""
    site, vector, h0 = read(path)
    layer = site.layer + 1
    with whole(vectors) as first, whole(reference) as second:
        torch.save({0: {layer: [vector]}}, first)
        torch.save({0: {layer: [h0]}}, second)
    return layer


def main(arguments: Sequence[str] | None = None) -> str:
    """The command line; returns what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    inwards = ways.add_parser("in", help="from ASTRA's two files to one safetensors file")
    outwards = ways.add_parser("out", help="from that file to ASTRA's two files")
    outwards.add_argument("steering", help="the safetensors file to read")
    for way, verb in ((inwards, "read"), (outwards, "write")):
        way.add_argument("--vectors", required=True, help=f"file of activations to steer along, to {verb}")
        way.add_argument("--reference", required=True, help=f"file of calibration activations, to {verb}")
    inwards.add_argument("--layer", type=int, required=True, help="ASTRA's --steer_layer, from 1: 20 for LLaVA-1.5-13B")
    inwards.add_argument("--out", required=True, help="safetensors file to write")
    given = parser.parse_args(arguments)
    if given.way == "in":
        site = from_astra(given.vectors, given.reference, given.layer, given.out)
        return f"wrote {given.out}: steering at {site}"
    layer = to_astra(given.steering, given.vectors, given.reference)
    return f"wrote {given.vectors} and {given.reference}; steer with --steer_layer {layer}"


if __name__ == "__main__":
    run(main)
