"""The whole flow: prompts, activations, attributed tokens, covariances, subspaces, repaired model."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedModel
from transformers.utils import logging

from . import resume as resuming
from .adapters import describe_adapters, unwrapped
from .attribution import attribute_tokens, kept_count
from .diagnosis import Diagnosis
from .gating import Gate
from .judges import is_refusal
from .linalg import RunningCovariance
from .modeling_care import CareForConditionalGeneration
from .provenance import origin
from .recipe import Recipe
from .samples import Batch, Sample, Samples, collate, generation_prompt, load_samples
from .site_check import check_contributions
from .site_choice import with_chosen_sites
from .sites import Site, hidden_size, record, visual_token_ids
from .subspace import SafetySubspaces, fit_subspaces
from .turn_repair import solve_turns
from .turns import Turns, record_turns

CLASSES = ("benign", "malicious")
COLLECTING_FIELDS = (
    "layers",
    "component",
    "sites",
    "modalities",
    "attribution",
    "keep_visual",
    "keep_text",
    "batch_size",
    "seed",
)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Streamed moments of the attributed tokens, per site, modality and class; all that subspaces are solved from.

    Attributes:
        moments: ``moments[site][modality]["benign" | "malicious"]``, float64, memory d x d each whatever the number of
            prompts.
        prompts: number of prompts per class.
        origin: of model and prompts, see `provenance.origin`.
    """

    moments: dict[Site, dict[str, dict[str, RunningCovariance]]]
    prompts: dict[str, int]
    origin: Mapping[str, str] = field(default_factory=dict)

    def at(self, sites: Iterable[Site]) -> "Statistics":
        """Only some of the sites; one collection over many serves recipes that differ in their layers."""
        return Statistics({site: self.moments[site] for site in sites}, self.prompts, self.origin)

    def solve(self, recipe: Recipe) -> SafetySubspaces:
        """Solve for the subspaces; cheap, so that one collection serves many ranks, centrings and fusions.

        Raises:
            ValueError: fewer attributed tokens than the rank, rank above d, or a benign covariance that is singular.
        """
        return fit_subspaces(
            self.moments,
            rank=recipe.rank,
            centring=recipe.centring,
            shrinkage=recipe.shrinkage,
            projector=recipe.projector,
            beta=0.0 if recipe.anchor == "none" else recipe.beta,
            fusion=recipe.fusion,
            fusion_weight=recipe.fusion_weight,
            strength=recipe.strength,
            metadata={
                "recipe": json.dumps(recipe.to_dict()),
                "prompts": json.dumps(self.prompts),
                **self.origin,
            },
        )


def fit(
    model: PreTrainedModel,
    benign: Iterable[Any],
    malicious: Iterable[Any],
    processor=None,
    recipe: Recipe | str | Path | None = None,
    *,
    exposed: Iterable[Any] | None = None,
    neutral: Iterable[Any] | None = None,
    refused: Iterable[Any] | None = None,
    judge: Callable[[str], bool] = is_refusal,
    diagnosis: Diagnosis | str | Path | None = None,
    resume: str | Path | None = None,
) -> CareForConditionalGeneration:
    """Fit a repair on benign and malicious prompts and return the repaired model; `model` itself stays as it is.

    Prompts come in any form that `samples.load_samples` takes, with and without images; a "kind" on each makes the gate
    compare like with like, and "groups" (topic, template) make its thresholds hold for what it has not seen.

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
        refused: further malicious prompts, which count as refused whatever `judge` says.
        judge: whether an answer is a refusal; by default by its first words, in English.
        diagnosis: of this model, for a recipe with ``sites="auto"``: what `care_hf.diagnose` gave, or its folder.
        resume: a file that keeps what is collected, written every five minutes and on interruption; a fit that finds it
            goes on from there.

    Raises:
        TypeError, ValueError: prompts, recipe and model do not fit together; raised before the first forward, but for
            too few refusals, which are known once the malicious prompts are answered.
        FloatingPointError: an activation is not finite.
    """
    model = unwrapped(model)
    _check_unrepaired(model)
    describe_adapters(model)  # raises what only the end of the fit would tell else
    recipe = with_chosen_sites(Recipe.load(recipe), diagnosis, model)
    processor = processor or load_processor(model)
    further = {"exposed": exposed, "neutral": neutral, "refused": refused}
    given = {name: data for name, data in further.items() if data is not None}
    if recipe.by_turn:
        turns = collect_turns(model, benign, malicious, processor, recipe, judge=judge, resume=resume, **given)
        subspaces = solve_turns(turns, recipe)
    elif given:
        raise ValueError(f"A recipe with scope={recipe.scope!r} has no use for {sorted(given)}; leave them out.")
    else:
        asked = prompt_scope(model, processor, recipe)
        statistics = collect(model, benign, malicious, processor, recipe, resume=resume)
        subspaces = replace(statistics.solve(recipe), **asked)
    repaired = CareForConditionalGeneration.from_base(model, subspaces)
    repaired.processor = processor
    return repaired


def collect_turns(
    model: PreTrainedModel,
    benign: Iterable[Any],
    malicious: Iterable[Any],
    processor,
    recipe: Recipe,
    *,
    exposed: Iterable[Any] | None = None,
    neutral: Iterable[Any] | None = None,
    refused: Iterable[Any] | None = None,
    judge: Callable[[str], bool] = is_refusal,
    resume: str | Path | None = None,
) -> Turns:
    """Run every prompt, and the malicious ones with an answer, and keep what `turn_repair.solve_turns` needs.

    Arguments and errors as in `fit`; one collection serves recipes that differ in what is solved alone.
    """
    model = unwrapped(model)
    _check_unrepaired(model)
    if (exposed is None) != (neutral is None):
        raise ValueError("`exposed` and `neutral` prompts are told from one another; give both or neither.")
    samples = {"benign": load_samples(benign, "benign"), "malicious": load_samples(malicious, "malicious")}
    if exposed is not None:
        samples |= {"exposed": load_samples(exposed, "exposed"), "neutral": load_samples(neutral, "neutral")}
    known = load_samples(refused, "refused") if refused is not None else []
    _check_disjoint({**samples, "refused": known} if known else samples)
    if known:
        samples["malicious"] = load_samples([*samples["malicious"], *known], "malicious")
    if recipe.rank > hidden_size(model):
        raise ValueError(f"rank={recipe.rank} exceeds the hidden size d={hidden_size(model)}; lower the rank.")
    path = Path(resume) if resume else None
    return record_turns(model, processor, samples, len(known), recipe, judge, path)


def prompt_scope(model: PreTrainedModel, processor, recipe: Recipe) -> dict[str, Any]:
    """What of `SafetySubspaces` tells where a prompt ends, and confines the repair to it; nothing in other scopes."""
    if recipe.scope != "prompt":
        return {}
    gate = Gate(generation_prompt(processor), torch.zeros(hidden_size(model), 0), torch.zeros(0))
    return {"scope": "prompt", "gate": gate, "gate_site": recipe.gate_site(model)}


def _check_unrepaired(model: PreTrainedModel) -> None:
    if isinstance(model, CareForConditionalGeneration):
        raise TypeError(
            "The model is repaired already; fit on the base (`model.vlm`'s checkpoint), or call `disable()` to compare."
        )


def _check_disjoint(samples: Mapping[str, Samples]) -> None:
    """Assert that every prompt belongs to one class only."""
    for first, second in combinations(samples, 2):
        if set(samples[first].digests) & set(samples[second].digests):
            raise ValueError(f"A prompt is in both `{first}` and `{second}`; every prompt belongs to one class only.")


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


def collect(
    model: PreTrainedModel,
    benign: Iterable[Any],
    malicious: Iterable[Any],
    processor,
    recipe: Recipe,
    *,
    resume: str | Path | None = None,
) -> Statistics:
    """Run every prompt once and stream the moments of its attributed tokens at the recipe's sites.

    Activations are those of the prompt, generation prompt included; tokens of the tokenizer's control vocabulary and
    padding never count. Arguments and errors as in `fit`.
    """
    model = unwrapped(model)
    _check_unrepaired(model)
    sites = recipe.find_sites(model)
    samples = {"benign": load_samples(benign, "benign"), "malicious": load_samples(malicious, "malicious")}
    collector = _Collector(model, processor, recipe, sites)
    collector.check(samples)
    check_contributions(model, sites, collate(processor, samples["benign"][: recipe.batch_size], ()).inputs)
    checkpoint = Path(resume) if resume else None
    settings = {name: value for name, value in recipe.to_dict().items() if name in COLLECTING_FIELDS}
    fingerprint = resuming.fingerprint(model, processor, samples, settings)
    done = collector.load(checkpoint, fingerprint) if checkpoint and checkpoint.exists() else 0
    work = [(name, start) for name in CLASSES for start in range(0, len(samples[name]), recipe.batch_size)]
    progress = logging.tqdm(total=len(work), initial=done, desc="Collecting activations", unit="batch")
    saved = time.monotonic()
    try:
        with progress:
            while done < len(work):
                name, start = work[done]
                collector.add(name, samples[name][start : start + recipe.batch_size])
                done += 1
                progress.update()
                if checkpoint and time.monotonic() - saved >= resuming.SAVE_SECONDS:
                    collector.save(checkpoint, fingerprint, done)
                    saved = time.monotonic()
    finally:
        # Also after Ctrl+C or a failing prompt: what was collected is not lost, unless it stopped within an update.
        if checkpoint and collector.whole:
            collector.save(checkpoint, fingerprint, done)
    counts = {name: len(items) for name, items in samples.items()}
    return Statistics(collector.moments, counts, origin(model, samples))


class _Collector:
    """Adds prompts to the moments, batch by batch."""

    def __init__(self, model: PreTrainedModel, processor, recipe: Recipe, sites: Sequence[Site]):
        self.model, self.processor, self.recipe, self.sites = model, processor, recipe, sites
        self.image_tokens = visual_token_ids(model.config)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.generator_state = self.generator.get_state()
        self.whole = True
        dimension = hidden_size(model)
        self.moments = {
            site: {m: {c: RunningCovariance(dimension) for c in CLASSES} for m in recipe.modalities} for site in sites
        }

    def check(self, samples: Mapping[str, Samples]) -> None:
        """Assert that prompts, recipe and model fit together, before any forward."""
        recipe, dimension = self.recipe, hidden_size(self.model)
        if recipe.rank > dimension:
            raise ValueError(f"rank={recipe.rank} exceeds the hidden size d={dimension}; lower the rank.")
        if "visual" in recipe.modalities and not self.image_tokens:
            raise ValueError(
                f"The configuration of {type(self.model).__name__} names no token in whose place images are, so visual "
                "tokens cannot be told; use Recipe(modalities=('text',))."
            )
        _check_disjoint(samples)
        for name, items in samples.items():
            if "visual" in recipe.modalities and not items.pictured:
                raise ValueError(
                    f"No `{name}` prompt has an image, so there is no visual subspace to fit; add prompts with images, "
                    "or use Recipe(modalities=('text',))."
                )
            for modality in recipe.modalities:
                self._check_rank(name, items, modality)

    def _check_rank(self, name: str, items: Samples, modality: str) -> None:
        carriers = items.pictured if modality == "visual" else range(len(items))
        if len(carriers) >= self.recipe.rank:
            return  # each gives a token at least, so there is no need to tokenise them twice
        batch = collate(self.processor, [items[i] for i in carriers], self.image_tokens, padding_side="right")
        lengths = getattr(batch, modality).sum(dim=1).tolist()
        keep = 1.0 if self.recipe.attribution == "all" else getattr(self.recipe, f"keep_{modality}")
        total = sum(kept_count(n, keep) for n in lengths)
        if total < self.recipe.rank:
            raise ValueError(
                f"rank={self.recipe.rank} exceeds the {total} {modality} tokens that {len(items)} `{name}` prompts "
                f"give; give more prompts, raise keep_{modality}, or lower the rank."
            )

    @torch.no_grad()
    def add(self, name: str, samples: Sequence[Sample]) -> None:
        """Run one batch of class `name`."""
        # Right padding: no prompt token sees it under causal attention, and positions count from 0 in every family.
        batch = collate(self.processor, samples, self.image_tokens, padding_side="right")
        inputs = {key: value.to(self.model.device) for key, value in batch.inputs.items()}
        was_training = self.model.training
        self.model.eval()
        try:
            with record(self.model, self.sites) as activations:
                # The headless model: logits over the whole prompt would be the largest tensor of all.
                self.model.base_model(**inputs, use_cache=False)
        finally:
            self.model.train(was_training)
        kept = {site: self._attribute(name, site, activations[site], batch) for site in self.sites}
        self.whole = False
        for site, tokens in kept.items():
            for modality in self.recipe.modalities:
                self.moments[site][modality][name].update(tokens[modality])
        self.generator_state = self.generator.get_state()
        self.whole = True

    def _attribute(self, name: str, site: Site, activations: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """The attributed tokens of a batch per modality, float32 (n, d)."""
        real = (batch.visual | batch.text).to(activations.device)
        if not torch.isfinite(activations[real]).all():
            raise FloatingPointError(
                f"Activations at site {site} are not finite on a {name} prompt; check the model's weights, or load it "
                "in bfloat16 or float32 if it is in float16."
            )
        kept: dict[str, list[torch.Tensor]] = {"visual": [], "text": []}
        for row, visual_mask, text_mask in zip(activations, batch.visual, batch.text, strict=True):
            tokens = {"visual": row[visual_mask.to(row.device)].float(), "text": row[text_mask.to(row.device)].float()}
            chosen = attribute_tokens(
                tokens["visual"],
                tokens["text"],
                self.recipe.keep_visual,
                self.recipe.keep_text,
                method=self.recipe.attribution,
                generator=self.generator,
            )
            for modality, indices in zip(("visual", "text"), chosen, strict=True):
                kept[modality].append(tokens[modality][indices])
        return {modality: torch.cat(tokens) for modality, tokens in kept.items()}

    def save(self, path: Path, fingerprint: str, done: int) -> None:
        """Write the moments so far, whole or not at all."""
        tensors = {"generator": self.generator_state}
        for key, moments in self._named():
            tensors.update({f"{key}.{field}": value.contiguous() for field, value in moments.state_dict().items()})
        resuming.save(path, tensors, fingerprint, done=str(done))

    def load(self, path: Path, fingerprint: str) -> int:
        """Take up the moments in `path`; returns the number of batches that are in them."""
        tensors, notes = resuming.load(path, fingerprint)
        self.generator_state = tensors.pop("generator")
        self.generator.set_state(self.generator_state)
        for site, modality, name in [(s, m, c) for s in self.sites for m in self.recipe.modalities for c in CLASSES]:
            prefix = f"{site}.{modality}.{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self.moments[site][modality][name] = RunningCovariance.from_state(state)
        return int(notes["done"])

    def _named(self):
        for site, by_modality in self.moments.items():
            for modality, by_class in by_modality.items():
                for name, moments in by_class.items():
                    yield f"{site}.{modality}.{name}", moments
