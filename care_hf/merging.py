"""A repair folded into the weights: an ordinary checkpoint of the base's own class, for any engine."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .merge_check import (
    TOLERANCES,
    as_list,
    check_algebra,
    difference,
    main_dtype,
    probe_inputs,
    reload_and_compare_tensors,
    token_logits,
)
from .merge_files import Originals, copy_other_files, find_originals, local_folder, rewrite, saved_tensors, write_config
from .mergeability import Plan, check_untied, check_vllm, check_weights, plan_merge
from .merged_model import fold, plain_copy
from .modeling_care import CareForConditionalGeneration
from .switching import refusal

COMPARISONS = ("logits", "tensors")


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote.

    Attributes:
        path: the checkpoint.
        changed: names of the tensors that differ from the base's, as checkpoints of the base call them.
        added: names of new tensors, biases all.
        rewritten: whether the base's own files were taken; otherwise all was written from memory.
        difference: of the logits from the repaired model's, root mean square, over their spread; None if not compared.
        tolerance: the difference up to which the merge counts as done.
    """

    path: Path
    changed: tuple[str, ...]
    added: tuple[str, ...]
    rewritten: bool
    difference: float | None
    tolerance: float


def merge(
    repaired: CareForConditionalGeneration | str | Path,
    path: str | Path,
    *,
    base: str | Path | None = None,
    inputs=None,
    compare: str = "logits",
    only_transformers: bool = False,
    max_shard_size: int | str = "1GB",
) -> Merged:
    """Write a repaired model as an ordinary checkpoint of its base's class, the repair folded into the weights.

    That is possible where the repair is an affine map of every token: no gate, scope "all", and one modality, or two
    under fusion "constant" or "union"; and where a linear layer puts out what is repaired. A constant offset goes into
    a bias, for which some text models have a flag in their configuration (`mlp_bias` of Llama).

    The base's own files are copied, and only what changes is overwritten in them, if they are found and hold the
    weights in memory. Then the checkpoint is loaded by the stock Auto class and compared: every tensor bit for bit, and
    the logits. `path` exists only once that is done.

    Args:
        repaired: the model, or the folder or repository of its checkpoint.
        path: a new folder.
        base: the base's own checkpoint, a folder or a repository; by default where the model remembers it is from.
        inputs: what to compare on, and what to measure on in errors: arguments of the model's forward, or a list of
            them. By default questions beside noise if the model has a processor, otherwise random tokens.
        only_transformers: whether nothing but transformers will load it. vLLM drops biases that its class of a model
            does not know, without a word, and would run it unrepaired; so what needs them is refused otherwise.
        compare: "logits", or "tensors" alone, without running the models.
        max_shard_size: of files that are written from memory.

    Returns:
        What was written.

    Raises:
        TypeError: the model is not repaired, or in a `PeftModel`.
        FileExistsError: there is something at `path`.
        ValueError: the repair cannot be merged (the message says which setting could, and what switching to it costs);
            there are adapters in the model, or its weights are quantised, offloaded, distributed or tied; `base` holds
            other weights; or what was written is not the repaired model, and was removed.
    """
    path = Path(path)
    if compare not in COMPARISONS:
        raise ValueError(f"compare={compare!r} is not known; choose one of {COMPARISONS}.")
    if path.exists():
        raise FileExistsError(f"There is something at {path}; give a new folder.")
    source = None if isinstance(repaired, CareForConditionalGeneration) else repaired
    if isinstance(source, (str, Path)):
        repaired, source = load_repaired(source)
    check_weights(repaired)
    inputs = as_list(probe_inputs(repaired) if inputs is None else inputs)
    plan, obstacles = plan_merge(repaired)
    if obstacles:
        raise ValueError(refusal(repaired, obstacles, inputs))
    if not only_transformers:
        check_vllm(repaired, plan)
    check_untied(repaired, plan)
    check_algebra(plan.maps, repaired)
    expected = _logits(repaired, inputs) if compare == "logits" else None
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        folder.chmod(0o755)  # temporary folders are the user's alone
        merged = _write(repaired, plan, folder, base, max_shard_size)
        _write_other_files(repaired, merged.originals, source, folder)
        found, tolerance = _compare(folder, merged, expected, inputs)
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Merged(path, merged.changed, merged.added, merged.originals is not None, found, tolerance)


def load_repaired(source: str | Path) -> tuple[CareForConditionalGeneration, Path]:
    """A repaired model from its checkpoint, on the CPU, where weights stay in their files; and its folder."""
    folder = local_folder(source)
    return CareForConditionalGeneration.from_pretrained(folder, dtype="auto").eval(), folder


@torch.no_grad()
def _logits(repaired: CareForConditionalGeneration, inputs) -> torch.Tensor:
    training = repaired.training
    try:
        with repaired.enable():
            return token_logits(repaired.eval(), inputs)
    finally:
        repaired.train(training)


@dataclass(frozen=True)
class Written:
    """What is in a folder, not yet compared: the model in memory, the files it was made of, the tensors in both."""

    model: PreTrainedModel
    originals: Originals | None
    changed: tuple[str, ...]
    added: tuple[str, ...]
    dtype: torch.dtype


def _write(repaired: CareForConditionalGeneration, plan: Plan, folder: Path, base, max_shard_size) -> Written:
    """Write weights and configuration."""
    model = plain_copy(repaired.vlm)
    originals = find_originals(model, base)
    touched = fold(model, plan)

    def saved(names):
        return saved_tensors(model, {name: model.get_parameter(name).detach() for name in names})

    tensors, added = saved(touched), tuple(sorted(saved(plan.biases)))
    changed = tuple(sorted(set(tensors) - set(added)))
    dtype = main_dtype(model)
    if originals is None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return Written(model, None, changed, added, dtype)
    if changed:
        dtype = min((originals.dtype_of(name) for name in changed), key=lambda dtype: dtype.itemsize)
        for name in touched:  # what is expected from here on is what the files can hold
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        tensors = {name: tensor.to(dtype) for name, tensor in saved(touched).items()}
    rewrite(originals, tensors, added, folder)
    write_config(model, originals, plan.flags, folder)
    return Written(model, originals, changed, added, dtype)


def _write_other_files(
    repaired: CareForConditionalGeneration, originals: Originals | None, source: Path | None, folder: Path
) -> None:
    if originals is not None:
        copy_other_files(originals.folder, folder, code=True)
    if source is not None:
        copy_other_files(source, folder, code=False)  # its Python files are those of the repair
    if repaired.processor is not None and not any(folder.glob("tokenizer*")):
        repaired.processor.save_pretrained(folder)


def _compare(folder: Path, written: Written, expected: torch.Tensor | None, inputs) -> tuple[float | None, float]:
    """The difference of logits, and the tolerance."""
    tolerance = max(TOLERANCES.get(dtype, 0) for dtype in (written.dtype, main_dtype(written.model)))
    loaded = reload_and_compare_tensors(folder, written.model)
    if expected is None:
        return None, tolerance
    found = difference(expected, token_logits(loaded, inputs))
    if not found <= tolerance:
        raise ValueError(
            f"The logits of what was written differ from the repaired model's by {found:.2g} of their spread, more "
            f"than the {tolerance:.2g} of rounding, so it was removed. Something beside the linear layers acts on "
            "what is repaired; keep the repaired model as it is."
        )
    return found, tolerance
