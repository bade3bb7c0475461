"""Plain arrays of safety directions (.npz, .safetensors) to a file of `care_hf.SafetySubspaces`, and back.

Arrays are named by layer (from 0), component and modality:

    layer16.ffn.visual         (d, k)  directions in columns, orthonormal; one direction may be (d,)
    layer16.ffn.visual.mean    (d,)    the anchor, as a rule the benign mean; without it the directions are removed
                                       linearly (beta 0)
    layer16.ffn.visual.beta    ()      how much of the anchor is put back; without it 1
    layer16.ffn.visual.reader  (d, k)  of an oblique projector; without it the projector is orthogonal

Components are ffn, attention and residual; ``layer16.visual`` stands for ``layer16.ffn.visual``. Modalities are visual
and text. Directions that are not orthonormal are refused, since ``I - B B^T`` of them is no projector; with
--orthonormalise a basis of their span takes their place.

The arrays are float32 in the subspaces, and come out as they are in there. What arrays cannot hold is refused or said:
a gate and what it repairs (last, response), and the scope "prompt", are refused; fusion, its weight and the strength
are printed on the way out, to be given on the way in.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safe_files import load_safetensors, run, save_safetensors, whole

from care_hf.linalg import orthonormalize
from care_hf.projection import FUSIONS, MODALITIES, Subspace
from care_hf.sites import COMPONENTS, Site
from care_hf.subspace import SafetySubspaces

NAME = re.compile(
    rf"layer(\d+)(?:\.({'|'.join(COMPONENTS)}))?\.({'|'.join(MODALITIES)})(?:\.(basis|mean|beta|reader))?"
)


def read_arrays(path: str | Path) -> dict[str, torch.Tensor]:
    """The arrays of a .npz or .safetensors file.

    Raises:
        ValueError: the file is broken, of another kind, or holds Python objects.
    """
    if Path(path).suffix == ".safetensors":
        return load_safetensors(path)[0]
    if Path(path).suffix != ".npz":
        raise ValueError(f"{path} is neither a .npz nor a .safetensors file; save the arrays as one of them.")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.array(file[name])) for name in file.files}
    except (ValueError, TypeError, OSError, EOFError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{path} cannot be read ({error}); expected a whole .npz of numeric arrays: Python objects could be code."
        ) from error


def to_subspaces(
    arrays: Mapping[str, torch.Tensor],
    *,
    orthonormalise: bool = False,
    metadata: Mapping[str, str] | None = None,
    **how,
) -> SafetySubspaces:
    """Subspaces of named arrays; see the module.

    Args:
        arrays: by name.
        orthonormalise: whether directions that are not orthonormal give way to a basis of their span.
        metadata: saved along.
        how: fusion, fusion_weight, strength of the `SafetySubspaces`.

    Raises:
        ValueError: a name or shape is unknown, directions are dependent or not orthonormal, or arrays differ in d.
    """
    parts: dict[tuple[Site, str], dict[str, torch.Tensor]] = {}
    for name, array in arrays.items():
        found = NAME.fullmatch(name)
        if not found:
            raise ValueError(
                f"The array {name!r} is not known; expected names such as 'layer16.ffn.visual' and "
                "'layer16.ffn.visual.mean'. Rename it, or leave it out."
            )
        layer, component, modality, leaf = found.groups()
        group = parts.setdefault((Site(int(layer), component or "ffn"), modality), {})
        if (leaf or "basis") in group:
            raise ValueError(f"The array {name!r} is there under two names; leave one of them out.")
        if not array.is_floating_point():
            raise ValueError(f"The array {name!r} is {array.dtype}; expected floating point numbers.")
        group[leaf or "basis"] = array
    sites: dict[Site, dict[str, Subspace]] = {}
    for (site, modality), group in sorted(parts.items()):
        try:
            sites.setdefault(site, {})[modality] = _subspace(group, orthonormalise)
        except ValueError as error:
            raise ValueError(f"layer{site.layer}.{site.component}.{modality}: {error}") from error
    return SafetySubspaces(sites, metadata=dict(metadata or {}), **how)


def _subspace(group: dict[str, torch.Tensor], orthonormalise: bool) -> Subspace:
    if "basis" not in group:
        raise ValueError(f"there is {sorted(group)} and no directions; give the array (d, k) itself.")
    basis = group["basis"][:, None] if group["basis"].ndim == 1 else group["basis"]
    if basis.ndim == 2 and basis.shape[1] > basis.shape[0]:
        raise ValueError(
            f"{tuple(basis.shape)} has more directions than dimensions; put directions in columns, (d, k)."
        )
    if "beta" in group and ("mean" not in group or group["beta"].numel() != 1):
        raise ValueError("a beta is one number and needs a mean to put back; give both or neither.")
    if orthonormalise:
        if "reader" in group:
            raise ValueError("a reader belongs to its basis, which --orthonormalise would change; leave one out.")
        basis = orthonormalize(basis)
    mean = group.get("mean", torch.zeros(len(basis)))
    beta = float(group["beta"]) if "beta" in group else float("mean" in group)
    try:
        return Subspace(basis, mean, beta, group.get("reader"))
    except ValueError as error:
        hint = " Here --orthonormalise does the former." if "basis^T basis" in str(error) else ""
        raise ValueError(f"{error}{hint}") from error


def to_arrays(subspaces: SafetySubspaces) -> dict[str, torch.Tensor]:
    """The arrays of subspaces, named as `to_subspaces` reads them.

    Raises:
        ValueError: the repair asks a gate.
    """
    turns = [str(site) for site, by_modality in subspaces.sites.items() if set(by_modality) - set(MODALITIES)]
    if subspaces.gate is not None or turns or subspaces.scope != "all":
        raise ValueError(
            f"The repair has a gate or a scope (scope={subspaces.scope!r}, by place at {turns or 'no site'}), which "
            "plain arrays cannot express; keep it as the file of subspaces that it is."
        )
    arrays = {}
    for site, by_modality in subspaces.sites.items():
        for modality, subspace in by_modality.items():
            name = f"layer{site.layer}.{site.component}.{modality}"
            arrays[name], arrays[f"{name}.mean"] = subspace.basis, subspace.mean
            arrays[f"{name}.beta"] = torch.tensor(subspace.beta, dtype=torch.float64)
            if subspace.reader is not None:
                arrays[f"{name}.reader"] = subspace.reader
    return arrays


def write_arrays(path: str | Path, arrays: Mapping[str, torch.Tensor]) -> None:
    """Write a .npz or .safetensors file, whole or not at all."""
    if Path(path).suffix == ".safetensors":
        save_safetensors(path, dict(arrays), {})
    elif Path(path).suffix == ".npz":
        with whole(path) as target:
            np.savez(target, **{name: array.detach().cpu().numpy() for name, array in arrays.items()})
    else:
        raise ValueError(f"{path} is neither a .npz nor a .safetensors file; end its name with one of them.")


def main(arguments: Sequence[str] | None = None) -> str:
    """The command line; returns what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    inwards = ways.add_parser("in", help="from arrays to a file of subspaces")
    outwards = ways.add_parser("out", help="from a file of subspaces to arrays")
    for way in (inwards, outwards):
        way.add_argument("file", help="file to read")
        way.add_argument("--out", required=True, help="file to write")
    inwards.add_argument("--orthonormalise", action="store_true", help="put a basis of their span for the directions")
    inwards.add_argument("--fusion", choices=FUSIONS, default="adaptive", help="how two corrections become one")
    inwards.add_argument("--fusion-weight", type=float, default=0.5, help="of the visual one, with fusion constant")
    inwards.add_argument("--strength", type=float, default=1.0, help="scale of the whole correction (default 1)")
    given = parser.parse_args(arguments)
    if given.way == "in":
        how = {name: getattr(given, name) for name in ("orthonormalise", "fusion", "fusion_weight", "strength")}
        subspaces = to_subspaces(read_arrays(given.file), metadata={"origin": Path(given.file).name}, **how)
        with whole(given.out) as target:
            subspaces.save(target)
        return f"wrote {given.out}: subspaces at {', '.join(map(str, subspaces.sites))}"
    subspaces = SafetySubspaces.load(given.file)
    write_arrays(given.out, to_arrays(subspaces))
    how = f"--fusion {subspaces.fusion} --fusion-weight {subspaces.fusion_weight} --strength {subspaces.strength}"
    return f"wrote {given.out}; not in the arrays, to be given on the way back: {how}"


if __name__ == "__main__":
    run(main)
