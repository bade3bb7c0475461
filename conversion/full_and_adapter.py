"""A repaired checkpoint to its repair alone, and back onto a base.

A repaired checkpoint holds the base's tensors and ours. Out comes a file of `care_hf.SafetySubspaces`: bases, anchors,
gate, fusion and strength, some 0.2 % of the whole; of the checkpoint nothing but our tensors is read. Back, the base is
loaded, repaired and saved with its processor, and must be the one that the repair was fitted on: a repair knows no more
of its base than the hidden size and the number of layers. Both ways are exact: what a repair holds is float32 in both.

Refused: checkpoints with adapters of PEFT among their weights, which the repair alone does not hold.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safe_files import run, stream_tensors, weight_files, whole
from transformers import AutoConfig, AutoProcessor

from care_hf import CareConfig, CareForConditionalGeneration, SafetySubspaces
from care_hf.configuration_care import auto_class
from care_hf.gating import Gate
from care_hf.projection import Subspace
from care_hf.sites import Site, decoder_layers, site_module


def to_adapter(checkpoint: str | Path) -> SafetySubspaces:
    """The repair of a repaired checkpoint's folder, without loading its base.

    Raises:
        ValueError: the folder holds another model, adapters, or a repair that is not whole.
        FileNotFoundError: it holds no weights.
    """
    checkpoint = Path(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    if not isinstance(config, CareConfig):
        raise ValueError(f"{checkpoint} holds a {config.model_type!r} model; expected a repaired one, of type 'care'.")
    if config.adapters:
        raise ValueError(
            f"{checkpoint} has the adapters {sorted(config.adapters)} of PEFT, which the repair alone does not hold; "
            "merge them into the base and fit that."
        )
    ours = {}
    for path in weight_files(checkpoint):
        ours |= stream_tensors(path, lambda name: ".care." in name or ".care_gate." in name)
    modules = _modules(config)
    first = modules[Site.parse(config.sites[0]["site"])]
    how = {"strength": float(_take(ours, f"{first}.care.strength")), "fusion": config.fusion, "scope": config.scope}
    sites = {}
    for entry in config.sites:
        site = Site.parse(entry["site"])
        sites[site] = {
            name: _subspace(ours, f"{modules[site]}.care.{name}", name in entry["oblique"]) for name in entry["ranks"]
        }
        if set(entry["ranks"]) <= {"visual", "text"}:
            how["fusion_weight"] = float(_take(ours, f"{modules[site]}.care.fusion_weight"))
    if config.gate:
        site = Site.parse(config.gate["site"])
        readers, thresholds = (_take(ours, f"{modules[site]}.care_gate.{leaf}") for leaf in ("readers", "thresholds"))
        gate = Gate(config.gate["prompt_end"], readers, thresholds, config.gate["required"], config.gate["pictured"])
        how |= {"gate": gate, "gate_site": site}
    return SafetySubspaces(sites, metadata=config.origin, **how)


def _modules(config: CareConfig) -> dict[Site, str]:
    """Names of the repaired modules and of the gate's, from the list of decoder layers on.

    A checkpoint's names may differ from the model's before that list, and nowhere else.
    """
    with torch.device("meta"):
        vlm = auto_class(config.vlm_config).from_config(config.vlm_config)
    names = {id(module): name for name, module in vlm.named_modules()}
    before = names[id(decoder_layers(vlm))].rpartition(".")[0]
    sites = [entry["site"] for entry in config.sites] + ([config.gate["site"]] if config.gate else [])
    of_sites = {Site.parse(site): names[id(site_module(vlm, Site.parse(site)))] for site in sites}
    return {site: name.removeprefix(f"{before}.") for site, name in of_sites.items()}


def _subspace(ours: dict[str, torch.Tensor], module: str, oblique: bool) -> Subspace:
    basis, mean, beta = (_take(ours, f"{module}.{leaf}") for leaf in ("basis", "mean", "beta"))
    return Subspace(basis, mean, float(beta), _take(ours, f"{module}.reader") if oblique else None)


def _take(ours: dict[str, torch.Tensor], end: str) -> torch.Tensor:
    found = [name for name in ours if name.endswith(f".{end}")]
    if len(found) != 1:
        raise ValueError(
            f"The checkpoint has {len(found)} tensors '...{end}'; expected one. Its repair is not whole; save it again."
        )
    return ours[found[0]]


def to_full(base: str | Path, subspaces: SafetySubspaces, out: str | Path) -> None:
    """Write the checkpoint of a base with this repair, and the base's processor if it has one, whole or not at all.

    Raises:
        ValueError: the repair does not fit the base.
    """
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    model = auto_class(config).from_pretrained(base, dtype="auto", local_files_only=True)
    repaired = CareForConditionalGeneration.from_base(model, subspaces)
    if any((Path(base) / name).exists() for name in ("processor_config.json", "preprocessor_config.json")):
        repaired.processor = AutoProcessor.from_pretrained(base, local_files_only=True)
    with whole(out, folder=True) as folder:
        repaired.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> str:
    """The command line; returns what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    adapter = ways.add_parser("adapter", help="from a repaired checkpoint to its repair alone")
    adapter.add_argument("checkpoint", help="folder of the repaired checkpoint")
    full = ways.add_parser("full", help="from a base and a repair to a repaired checkpoint")
    full.add_argument("base", help="folder of the base")
    full.add_argument("repair", help="file of subspaces to read")
    for way, what in ((adapter, "file of subspaces"), (full, "folder")):
        way.add_argument("--out", required=True, help=f"{what} to write; must not exist")
    given = parser.parse_args(arguments)
    if given.way == "adapter":
        subspaces = to_adapter(given.checkpoint)
        with whole(given.out) as target:
            subspaces.save(target)
        return f"wrote {given.out}: the repair of {', '.join(map(str, subspaces.sites))}"
    to_full(given.base, SafetySubspaces.load(given.repair), given.out)
    return f"wrote {given.out}; load it with AutoModelForImageTextToText after `import care_hf`"


if __name__ == "__main__":
    run(main)
