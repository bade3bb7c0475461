"""A repaired checkpoint to an adapter, its repair alone, and back onto its base.

A repaired checkpoint holds the base's tensors and ours. Out comes a folder as `care_hf.save_adapter` writes it: one
file with bases, anchors, gate, fusion and strength, and what its base is known by: its name, if it has one on the Hub,
and 32 values of each weight. For that the checkpoint is loaded and checked, but on a CPU its weights stay in their
files, mapped (other than those that transformers converts on loading, as those of some mixtures of experts).

Back, the base is loaded in the precision that it had under the repair, compared, repaired and saved with its processor;
another base is refused. What a repair holds is float32 everywhere, so both ways are exact. The base's weights are those
of its folder: that they are the checkpoint's is as sure as those 32 values of each. What could be compared is printed,
and kept in the new checkpoint's origin as "base_match".

Refused: checkpoints with adapters of PEFT among their weights, which the repair alone does not hold, and those whose
weights loading would cast, since they are in several precisions.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safe_files import run, stream_tensors, weight_files, whole
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from care_hf import CareConfig, CareForConditionalGeneration, base_fingerprint, load_adapter, save_adapter
from care_hf.checkpoint import ADAPTER_FILE
from care_hf.loading import of_the_repair
from care_hf.subspace_files import read

PROCESSORS = {
    "processor_config.json": AutoProcessor,
    "preprocessor_config.json": AutoProcessor,
    "tokenizer_config.json": AutoTokenizer,  # of a base without images
}


def to_adapter(checkpoint: str | Path, out: str | Path) -> None:
    """Write the repair of a repaired checkpoint's folder as the folder of an adapter, whole or not at all.

    Raises:
        ValueError: the folder holds another model, adapters of PEFT, weights that loading casts, or a repair that is
            not whole.
        FileExistsError: there is something at `out`.
        OSError: there is no such checkpoint, or it cannot be written.
    """
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    if not isinstance(config, CareConfig):
        raise ValueError(f"{checkpoint} holds a {config.model_type!r} model; expected a repaired one, of type 'care'.")
    if config.adapters:
        raise ValueError(
            f"{checkpoint} has the adapters {sorted(config.adapters)} of PEFT, which the repair alone does not hold; "
            "merge them into the base and fit that."
        )
    with whole(out, folder=True) as folder:
        repaired = CareForConditionalGeneration.from_pretrained(checkpoint, dtype="auto", local_files_only=True)
        _check_precision(Path(checkpoint), repaired)
        save_adapter(repaired, folder)


def _check_precision(checkpoint: Path, repaired: CareForConditionalGeneration) -> None:
    """Assert that the base was loaded as it is in the files, for what it is known by is read from what was loaded.

    Raises:
        ValueError: some of its weights were cast.
    """
    if getattr(repaired, "is_quantized", False):
        return  # what goes with quantised weights has precisions of its own
    stored = (pair for path in weight_files(checkpoint) for pair in stream_tensors(path))
    names = [
        sorted({str(t.dtype) for name, t in pairs if t.is_floating_point() and not of_the_repair(name)})
        for pairs in (stored, repaired.state_dict().items())
    ]
    if names[0] != names[1]:
        raise ValueError(
            f"{checkpoint} holds the base in {', '.join(names[0])}, of which loading makes {', '.join(names[1])}; save "
            "it from a model in one precision."
        )


def to_full(base: str | Path, adapter: str | Path, out: str | Path) -> str:
    """Write the checkpoint of a base with an adapter, and the base's processor if it has one, whole or not at all.

    Args:
        base: the folder of the base.
        adapter: the folder, or file, of the adapter.
        out: the folder to write.

    Returns:
        How surely the base is the adapter's: "exact", or what was compared; see `care_hf.load_adapter`.

    Raises:
        ValueError: the adapter is broken, for another base, or does not name its base.
        FileExistsError: there is something at `out`.
        OSError: there is no such base or adapter, or it cannot be written.
    """
    with whole(out, folder=True) as folder:
        repaired = load_adapter(base, adapter, dtype=_dtype(adapter), local_files_only=True)
        for name, auto in PROCESSORS.items():
            if repaired.processor is None and (Path(base) / name).exists():
                repaired.processor = auto.from_pretrained(base)  # arguments would be saved with a tokenizer
        repaired.save_pretrained(folder)
    return repaired.config.origin["base_match"]


def _dtype(adapter: str | Path) -> torch.dtype | str:
    """The precision of the base that the adapter was saved with, which need not be that of the base's files."""
    path = Path(adapter)
    path = path / ADAPTER_FILE if path.is_dir() else path
    _, facts, values = read(path) if path.is_file() else (None, None, None)  # what is not there `load_adapter` tells
    return "auto" if facts is None else base_fingerprint.main_dtype(facts, values) or "auto"


def main(arguments: Sequence[str] | None = None) -> str:
    """The command line; returns what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    inwards = ways.add_parser("adapter", help="from a repaired checkpoint to its repair alone")
    inwards.add_argument("checkpoint", help="folder of the repaired checkpoint")
    outwards = ways.add_parser("full", help="from a base and an adapter to a repaired checkpoint")
    outwards.add_argument("base", help="folder of the base")
    outwards.add_argument("adapter", help="folder or file of the adapter")
    for way in (inwards, outwards):
        way.add_argument("--out", required=True, help="folder to write; must not exist")
    given = parser.parse_args(arguments)
    if given.way == "adapter":
        to_adapter(given.checkpoint, given.out)
        return f"wrote {given.out}; put it on its base with care_hf.load_adapter"
    match = to_full(given.base, given.adapter, given.out)
    return f"wrote {given.out} (base compared: {match}); load it with its base's Auto class after `import care_hf`"


if __name__ == "__main__":
    run(main)
