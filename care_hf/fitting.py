"""The whole flow: prompts, activations, attributed tokens, covariances, subspaces, repaired model."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from transformers import AutoProcessor, PreTrainedModel

from .adapters import describe_adapters, unwrapped
from .collecting import Statistics as Statistics  # what others take from here
from .collecting import check_unrepaired, collect
from .collection import check_disjoint
from .diagnosis import Diagnosis
from .gating import Gate
from .judges import is_refusal
from .modeling_care import CareForConditionalGeneration
from .processes import joined
from .recipe import Recipe
from .samples import Samples, generation_prompt, load_samples
from .site_choice import with_chosen_sites
from .sites import hidden_size
from .turn_repair import solve_turns
from .turns import Turns, record_turns


def fit(
    model: PreTrainedModel,
    benign: Iterable[Any] | None = None,
    malicious: Iterable[Any] | None = None,
    processor=None,
    recipe: Recipe | str | Path | None = None,
    *,
    exposed: Iterable[Any] | None = None,
    neutral: Iterable[Any] | None = None,
    refused: Iterable[Any] | None = None,
    judge: Callable[[str], bool] = is_refusal,
    diagnosis: Diagnosis | str | Path | None = None,
    resume: str | Path | None = None,
    update: str | Path | None = None,
) -> CareForConditionalGeneration:
    """Fit a repair on benign and malicious prompts and return the repaired model; `model` itself stays as it is.

    Prompts come in any form that `samples.load_samples` takes, with and without images; a "kind" on each makes the gate
    compare like with like, and "groups" (topic, template) make its thresholds hold for what it has not seen.

    Where `torch.distributed` is initialised, all processes call this with the same arguments. Each runs its part of the
    prompts, and all return the same repair, that of one process up to rounding. If the processes hold the model
    together (tensor parallel, FSDP 2), all run all prompts. When one fails, so do all, with the batches that are done
    kept in `resume`; the same call goes on from there, in any number of processes.

    Args:
        model: any vision-language model that transformers loads, or a `PeftModel` of one, whose adapters are then part
            of the base; its weights are shared with the result, not copied.
        benign: requests that should be granted.
        malicious: requests that should be refused. Under the default recipe some must be such that the model refuses
            them, in plain words; the others may be jailbreaks, and there need not be any.
        processor: the model's processor; by default it is loaded from where the model came from.
        recipe: a `Recipe`, the name of one ("gated", "paper"), a YAML file, or None for the default, "gated".
        exposed: harmless questions about harmful things ("what is this?"), which should be answered. With `neutral`
            they teach the gate what is harmful in every modality without any jailbreak, and not to refuse such
            questions.
        neutral: harmless questions about harmless things.
        refused: further malicious prompts, which count as refused whatever `judge` says; they come before the others.
        judge: whether an answer is a refusal; by default by its first words, in English.
        diagnosis: of this model, for a recipe with ``sites="auto"``: what `care_hf.diagnose` gave, or its folder.
        resume: a safetensors file that keeps what is collected (moments in float64 or activations in float32, and of
            the prompts digests, kinds, groups and answers), written every five minutes and on interruption; the same
            fit goes on from there, with batches of any size. Of several processes the others keep theirs in files
            beside it (".rank1.safetensors"), in a folder that all must share, until these are merged into it.
        update: such a file, of a fit that was finished: the prompts given, of any class, are added to those in it, and
            the result is that of a fit from scratch on the earlier prompts and then the new ones, up to rounding. The
            file stays as it is; `resume` keeps the new state. Without new prompts the subspaces are solved anew,
            perhaps by a recipe with another rank.

    Raises:
        TypeError, ValueError: prompts, recipe and model do not fit together, or a file is of other work; raised before
            the first forward, but for too few refusals, which are known once the malicious prompts are answered.
        OSError: there is no file `update`, or `resume` cannot be written.
        FloatingPointError: an activation is not finite.
        torch.OutOfMemoryError: memory does not suffice for a single prompt.
        ProcessFailed: another process failed, or is gone; a `ConnectionError`.
    """
    with joined():
        return _fit(
            unwrapped(model),
            processor,
            recipe,
            diagnosis,
            judge,
            {"resume": resume, "update": update},
            {"benign": benign, "malicious": malicious},
            {"exposed": exposed, "neutral": neutral, "refused": refused},
        )


def _fit(
    model: PreTrainedModel,
    processor,
    recipe: Recipe | str | Path | None,
    diagnosis: Diagnosis | str | Path | None,
    judge: Callable[[str], bool],
    files: dict[str, str | Path | None],
    prompts: dict[str, Iterable[Any] | None],
    further: dict[str, Iterable[Any] | None],
) -> CareForConditionalGeneration:
    check_unrepaired(model)
    describe_adapters(model)  # raises what only the end of the fit would tell else
    recipe = with_chosen_sites(Recipe.load(recipe), diagnosis, model)
    processor = processor or load_processor(model)
    given = {name: data for name, data in further.items() if data is not None}
    if recipe.by_turn:
        turns = collect_turns(model, processor=processor, recipe=recipe, judge=judge, **files, **prompts, **given)
        subspaces = solve_turns(turns, recipe)
    elif given:
        raise ValueError(f"A recipe with scope={recipe.scope!r} has no use for {sorted(given)}; leave them out.")
    else:
        asked = prompt_scope(model, processor, recipe)
        statistics = collect(model, processor=processor, recipe=recipe, **files, **prompts)
        subspaces = replace(statistics.solve(recipe), **asked)
    repaired = CareForConditionalGeneration.from_base(model, subspaces)
    repaired.processor = processor
    return repaired


def collect_turns(
    model: PreTrainedModel,
    benign: Iterable[Any] | None,
    malicious: Iterable[Any] | None,
    processor,
    recipe: Recipe,
    *,
    exposed: Iterable[Any] | None = None,
    neutral: Iterable[Any] | None = None,
    refused: Iterable[Any] | None = None,
    judge: Callable[[str], bool] = is_refusal,
    resume: str | Path | None = None,
    update: str | Path | None = None,
) -> Turns:
    """Run every prompt, and the malicious ones with an answer, and keep what `turn_repair.solve_turns` needs.

    Arguments and errors as in `fit`; one collection serves recipes that differ in what is solved alone.
    """
    given = {"benign": benign, "malicious": malicious, "exposed": exposed, "neutral": neutral, "refused": refused}
    with joined():  # before prompts are read: what fails there in one process ends all
        return _collect_turns(unwrapped(model), processor, recipe, judge, resume, update, given)


def _collect_turns(
    model: PreTrainedModel,
    processor,
    recipe: Recipe,
    judge: Callable[[str], bool],
    resume: str | Path | None,
    update: str | Path | None,
    given: dict[str, Iterable[Any] | None],
) -> Turns:
    check_unrepaired(model)
    if update is None and (given["exposed"] is None) != (given["neutral"] is None):
        raise ValueError("`exposed` and `neutral` prompts are told from one another; give both or neither.")
    needed = ("benign", "malicious") if update is None else ()
    samples = {name: load_samples(data, name) for name, data in given.items() if data is not None or name in needed}
    check_disjoint(samples)
    known = samples.pop("refused", [])
    if known:
        # Read anew whenever they are asked for, as all prompts are.
        parts = [known, samples["malicious"]] if "malicious" in samples else [known]
        samples["malicious"] = Samples(ConcatDataset(parts), "malicious")
    if recipe.rank > hidden_size(model):
        raise ValueError(f"rank={recipe.rank} exceeds the hidden size d={hidden_size(model)}; lower the rank.")
    files = [Path(path) if path else None for path in (resume, update)]
    return record_turns(model, processor, samples, len(known), recipe, judge, *files)


def prompt_scope(model: PreTrainedModel, processor, recipe: Recipe) -> dict[str, Any]:
    """What of `SafetySubspaces` tells where a prompt ends, and confines the repair to it; nothing in other scopes."""
    if recipe.scope != "prompt":
        return {}
    gate = Gate(generation_prompt(processor), torch.zeros(hidden_size(model), 0), torch.zeros(0))
    return {"scope": "prompt", "gate": gate, "gate_site": recipe.gate_site(model)}


def load_processor(model: PreTrainedModel):
    """Load the processor that belongs to `model` from the folder or repo it was loaded from.

    Raises:
        ValueError: the model was not loaded from anywhere, or there is no processor there.
    """
    source = model.config._name_or_path
    if not source:
        raise ValueError(
            "The model was not loaded from a folder or repo, so its processor is unknown; pass `processor=`."
        )
    try:
        return AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"No processor could be loaded from {source!r}; pass `processor=`.") from error
