"""Control vectors of repeng and llama.cpp (GGUF) to `care_hf.steering_vectors.SteeringVectors`, and back.

A control vector is a GGUF file of the architecture "controlvector" with tensors direction.N, float32 (d,), and the
metadata controlvector.model_hint and controlvector.layer_count. llama.cpp adds direction.N, times a strength from the
command line, to the output of decoder layer N counted from 0, at every token; so does `SteeringVectors` at the site
N.residual. Both ways are exact.

What cannot be expressed is refused:

- out: a vector at layer 0, which llama.cpp never steers; ASTRA's steering and every repair, the rank-1 ones too: what
  they add depends on the activation, and a control vector is constant;
- in: tensors of other names, types or shapes, as in llama.cpp; metadata of keys that neither program knows, for they
  may say that the directions are not meant to be added (--ignore KEY adds them all the same).

repeng's normalize and operator are arguments of its calls and not in the file. Needs `pip install gguf`.
"""

import argparse
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safe_files import check_vectors, load_safetensors, run, save_safetensors, whole

from care_hf.sites import Site
from care_hf.steering_vectors import FORMAT

ARCHITECTURE = "controlvector"
KNOWN = ("controlvector.model_hint", "controlvector.layer_count")


def read_gguf(path: str | Path, ignore: Collection[str] = ()) -> tuple[dict[int, torch.Tensor], str]:
    """Directions by layer, from 1, and the name of the model that they are for.

    Args:
        path: a GGUF file.
        ignore: metadata keys to pass over.

    Raises:
        ImportError: gguf is not installed.
        ValueError: the file is broken, no control vector, or says what cannot be expressed.
    """
    reader = _gguf().GGUFReader
    try:
        file = reader(path)
        metadata = {key: field.contents() for key, field in file.fields.items()}
        tensors = [(t.name, t.tensor_type.name, tuple(map(int, t.shape)), np.array(t.data)) for t in file.tensors]
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}); copy it again.") from error
    if metadata.get("general.architecture") != ARCHITECTURE:
        raise ValueError(
            f"{path} has the architecture {metadata.get('general.architecture')!r}; expected {ARCHITECTURE!r}: this is "
            "no control vector."
        )
    unknown = [k for k in metadata if not k.startswith(("GGUF.", "general.")) and k not in {*KNOWN, *ignore}]
    if unknown:
        raise ValueError(
            f"{path} has metadata that llama.cpp and repeng do not know: {unknown}. If its directions are meant to be "
            f"added all the same, give {' '.join(f'--ignore {key}' for key in unknown)}."
        )
    directions = {}
    for name, kind, shape, data in tensors:
        number = re.fullmatch(r"direction\.([1-9]\d*)", name)
        if not number or kind != "F32" or len(shape) != 1:
            raise ValueError(
                f"{path}: the tensor {name!r} is {kind} {shape}; expected 'direction.N', N from 1, F32 of shape (d,). "
                "llama.cpp does not load it either."
            )
        directions[int(number[1])] = torch.from_numpy(data)
    check_vectors(directions, "direction", path)
    return dict(sorted(directions.items())), str(metadata.get("controlvector.model_hint", ""))


def write_gguf(path: str | Path, directions: Mapping[int, torch.Tensor], model_hint: str) -> None:
    """Write a control vector, as both programs read it.

    Raises:
        ImportError: gguf is not installed.
        ValueError: there is a vector for layer 0.
    """
    if min(directions) < 1:
        raise ValueError(
            f"Layer {min(directions)} has a vector; expected layers from 1 on: llama.cpp never steers layer 0. Fit the "
            "steering without it."
        )
    gguf = _gguf()
    with whole(path) as target:
        writer = gguf.GGUFWriter(target, ARCHITECTURE)
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(directions))
        for layer, direction in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", direction.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def from_gguf(path: str | Path, out: str | Path, strength: float = 1.0, ignore: Collection[str] = ()) -> list[Site]:
    """Write what `SteeringVectors.load` reads.

    Args:
        path: a GGUF file.
        out: the safetensors file to write.
        strength: what every direction is multiplied by, as with --control-vector-scaled; negative steers away.
        ignore: metadata keys to pass over.

    Raises:
        ImportError, ValueError: see `read_gguf`.
    """
    directions, hint = read_gguf(path, ignore)
    scaled = {Site(layer, "residual"): strength * direction for layer, direction in directions.items()}
    check_vectors(scaled, f"direction times {strength} at site", path)
    settings = {"origin": Path(path).name, "model_hint": hint, "strength": strength}
    tensors = {f"sites.{site}.vector": vector for site, vector in scaled.items()}
    save_safetensors(out, tensors, {"format": FORMAT, "settings": json.dumps(settings)})
    return list(scaled)


def to_gguf(path: str | Path, out: str | Path, model_hint: str | None = None) -> list[int]:
    """Write the vectors of a file that `SteeringVectors.save` wrote as a control vector; returns their layers.

    Raises:
        ImportError: gguf is not installed.
        ValueError: the file holds no vectors that are merely added, or one at layer 0.
    """
    tensors, metadata = load_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} has the format {metadata.get('format')!r}; expected {FORMAT!r}, vectors that are added as they "
            "are. What a repair or ASTRA adds depends on the activation, which no control vector can express."
        )
    sites = {name: re.fullmatch(r"sites\.(\d+)\.residual\.vector", name) for name in tensors}
    odd = [name for name, found in sites.items() if not found]
    if odd:
        raise ValueError(f"{path} holds {odd}; expected 'sites.N.residual.vector' alone. Save it again.")
    directions = {int(found[1]): tensors[name] for name, found in sites.items()}
    check_vectors(directions, "vector of layer", path)
    hint = json.loads(metadata.get("settings", "{}")).get("model_hint", "") if model_hint is None else model_hint
    write_gguf(out, directions, hint)
    return sorted(directions)


def _gguf():
    try:
        import gguf
    except ImportError as error:
        raise ImportError("Control vectors are GGUF files; install what reads them with `pip install gguf`.") from error
    return gguf


def main(arguments: Sequence[str] | None = None) -> str:
    """The command line; returns what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    inwards = ways.add_parser("in", help="from a GGUF control vector to steering vectors")
    outwards = ways.add_parser("out", help="from steering vectors to a GGUF control vector")
    for way in (inwards, outwards):
        way.add_argument("file", help="file to read")
        way.add_argument("--out", required=True, help="file to write")
    inwards.add_argument(
        "--strength", type=float, default=1.0, help="what every direction is multiplied by (default 1)"
    )
    inwards.add_argument("--ignore", action="append", default=[], metavar="KEY", help="metadata key to pass over")
    outwards.add_argument("--model-hint", help="architecture of the model, such as llama; by default as it was read")
    given = parser.parse_args(arguments)
    if given.way == "in":
        sites = from_gguf(given.file, given.out, given.strength, given.ignore)
        return f"wrote {given.out}: vectors at {', '.join(map(str, sites))}"
    layers = to_gguf(given.file, given.out, given.model_hint)
    return f"wrote {given.out}: directions of layers {', '.join(map(str, layers))}"


if __name__ == "__main__":
    run(main)
