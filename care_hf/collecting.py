"""Prompts to streamed moments of their attributed tokens, all that subspaces of modalities are solved from."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .adapters import unwrapped
from .attribution import attribute_tokens, kept_count
from .batching import first_size, run_batches
from .collection import Collection, PromptFacts, describe
from .linalg import RunningCovariance
from .modeling_care import CareForConditionalGeneration
from .processes import Processes, joined
from .provenance import origin
from .reading import read
from .recipe import Recipe
from .samples import Batch, Sample, Samples, collate, load_samples
from .shared_collection import SharedCollection
from .site_check import check_contributions
from .sites import Site, hidden_size, visual_token_ids
from .spans import Spans, size, tidy
from .subspace import SafetySubspaces, fit_subspaces

CLASSES = ("benign", "malicious")
MODALITIES = ("visual", "text")
COLLECTING_FIELDS = ("modalities", "attribution", "keep_visual", "keep_text", "seed")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Streamed moments of the attributed tokens, per site, modality and class; all that subspaces are solved from.

    Attributes:
        moments: ``moments[site][modality]["benign" | "malicious"]``, float64, memory d x d each at most, whatever the
            number of prompts.
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


def collect(
    model: PreTrainedModel,
    benign: Iterable[Any] | None,
    malicious: Iterable[Any] | None,
    processor,
    recipe: Recipe,
    *,
    resume: str | Path | None = None,
    update: str | Path | None = None,
) -> Statistics:
    """Run every prompt once and stream the moments of its attributed tokens at the recipe's sites.

    Activations are those of the prompt, generation prompt included; tokens of the tokenizer's control vocabulary and
    padding never count. Arguments, errors and processes as in `fitting.fit`.
    """
    with joined() as together:
        return _collect(together, unwrapped(model), benign, malicious, processor, recipe, resume, update)


def _collect(together: Processes, model, benign, malicious, processor, recipe: Recipe, resume, update) -> Statistics:
    check_unrepaired(model)
    sites = recipe.find_sites(model)
    given = {"benign": benign, "malicious": malicious}
    samples = {name: load_samples(data, name) for name, data in given.items() if data is not None or update is None}
    collector = _Collector(model, processor, recipe, sites)
    collector.check_dimension()
    facts = {name: PromptFacts.of(items) for name, items in samples.items()}
    files = [Path(path) if path else None for path in (resume, update)]
    shared = SharedCollection(together, model, collector.work(), facts, *files)
    kept = shared.kept
    if update is None:
        collector.check(samples)
    for items in list(samples.values())[:1]:
        check_contributions(model, sites, collate(processor, items[:1], ()).inputs)
    shared.begin(collector)
    run_batches(
        model,
        shared.todo(),
        lambda name, start, stop: collector.read(
            name, start, kept.batch(samples, name, start, stop), kept.prompts[name].digests[start:stop]
        ),
        collector.keep,
        size=first_size(recipe.batch_size, model),
        description="Collecting activations",
        finished=sum(map(size, shared.done.values())),
        save=lambda: collector.save(kept),
        together=together,
    )
    collector.join(shared)
    shared.finish(collector)
    return Statistics(collector.moments, kept.counts, origin(model, kept.prompts))


def check_unrepaired(model: PreTrainedModel) -> None:
    """Assert that `model` is a base.

    Raises:
        TypeError: it is repaired.
    """
    if isinstance(model, CareForConditionalGeneration):
        raise TypeError(
            "The model is repaired already; fit on the base (`model.vlm`'s checkpoint), or call `disable()` to compare."
        )


Tokens = dict[Site, dict[str, torch.Tensor]]  # the attributed tokens of a batch, by modality float32 (n, d)


class _Collector:
    """Adds prompts to the moments, batch by batch."""

    def __init__(self, model: PreTrainedModel, processor, recipe: Recipe, sites: Sequence[Site]):
        self.model, self.processor, self.recipe, self.sites = model, processor, recipe, sites
        self.image_tokens = visual_token_ids(model.config)
        self.done: dict[str, Spans] = {name: [] for name in CLASSES}
        self.whole = True
        dimension = hidden_size(model)
        self.moments = {
            site: {m: {c: RunningCovariance(dimension) for c in CLASSES} for m in recipe.modalities} for site in sites
        }

    def work(self) -> dict[str, Any]:
        """What the moments depend on beside the prompts."""
        settings = {name: value for name, value in self.recipe.to_dict().items() if name in COLLECTING_FIELDS}
        return describe("moments", self.model, self.processor, {"sites": list(map(str, self.sites)), **settings})

    def check_dimension(self) -> None:
        """Assert that the model has what the recipe asks for."""
        recipe, dimension = self.recipe, hidden_size(self.model)
        if recipe.rank > dimension:
            raise ValueError(f"rank={recipe.rank} exceeds the hidden size d={dimension}; lower the rank.")
        if "visual" in recipe.modalities and not self.image_tokens:
            raise ValueError(
                f"The configuration of {type(self.model).__name__} names no token in whose place images are, so visual "
                "tokens cannot be told; use Recipe(modalities=('text',))."
            )

    def check(self, samples: Mapping[str, Samples]) -> None:
        """Assert that all prompts are enough for the recipe, before any forward."""
        for name, items in samples.items():
            if "visual" in self.recipe.modalities and not items.pictured:
                raise ValueError(
                    f"No `{name}` prompt has an image, so there is no visual subspace to fit; add prompts with images, "
                    "or use Recipe(modalities=('text',))."
                )
            for modality in self.recipe.modalities:
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

    def read(self, name: str, start: int, samples: Sequence[Sample], digests: Sequence[str]) -> tuple[range, Tokens]:
        """Run one batch of class `name`: which prompts these are, the `start`-th first, and their attributed tokens."""
        # Right padding: no prompt token sees it under causal attention, and positions count from 0 in every family.
        batch = collate(self.processor, samples, self.image_tokens, padding_side="right")
        activations = read(self.model, self.sites, batch.inputs)
        found = {site: self._attribute(name, site, activations[site], batch, digests) for site in self.sites}
        return range(start, start + len(samples)), found

    def keep(self, name: str, found: tuple[range, Tokens]) -> None:
        """Add what `read` gave to the moments."""
        prompts, kept = found
        self.whole = False
        for site, tokens in kept.items():
            for modality in self.recipe.modalities:
                self.moments[site][modality][name].update(tokens[modality])
        self.done[name] = tidy([*self.done[name], prompts])
        self.whole = True

    def _attribute(
        self, name: str, site: Site, activations: torch.Tensor, batch: Batch, digests: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """The attributed tokens of a batch per modality, float32 (n, d)."""
        real = (batch.visual | batch.text).to(activations.device)
        if not torch.isfinite(activations[real]).all():
            raise FloatingPointError(
                f"Activations at site {site} are not finite on a {name} prompt; check the model's weights, or load it "
                "in bfloat16 or float32 if it is in float16."
            )
        kept: dict[str, list[torch.Tensor]] = {"visual": [], "text": []}
        for row, visual_mask, text_mask, digest in zip(activations, batch.visual, batch.text, digests, strict=True):
            tokens = {"visual": row[visual_mask.to(row.device)].float(), "text": row[text_mask.to(row.device)].float()}
            chosen = attribute_tokens(
                tokens["visual"],
                tokens["text"],
                self.recipe.keep_visual,
                self.recipe.keep_text,
                method=self.recipe.attribution,
                generator=self._generator(site, digest),
            )
            for modality, indices in zip(MODALITIES, chosen, strict=True):
                kept[modality].append(tokens[modality][indices])
        return {modality: torch.cat(tokens) for modality, tokens in kept.items()}

    def _generator(self, site: Site, digest: str) -> torch.Generator | None:
        """What tokens are drawn by: of each prompt its own, so that neither batches nor other prompts matter."""
        if self.recipe.attribution != "random":
            return None
        seed = hashlib.sha256(f"{self.recipe.seed} {site} {digest}".encode()).digest()[:8]
        return torch.Generator().manual_seed(int.from_bytes(seed, "big"))

    def save(self, into: Collection) -> None:
        """Write the moments so far, unless an interruption left them between two states."""
        if not self.whole:
            return
        tensors = {}
        for key, moments in self._named():
            tensors.update({f"{key}.{field}": value.contiguous() for field, value in moments.state_dict().items()})
        into.save(tensors, self.done)

    def take(self, kept: Collection) -> None:
        """Add what `save` wrote."""
        for key, moments in self._named():
            prefix = f"{key}."
            state = {key.removeprefix(prefix): value for key, value in kept.tensors.items() if key.startswith(prefix)}
            moments.merge(RunningCovariance.from_state(state))
        self._add(kept.done)

    def join(self, shared: SharedCollection) -> None:
        """Make the moments of all processes the own ones, by rank, so that it does not matter which was faster."""
        if shared.together.count == 1:
            return
        self.whole = False
        for site, modality, name in self._places():
            own = self.moments[site][modality][name]
            device = own.mean.device
            own.to("cpu")  # that of another process may not be here
            # One after the other: of all at once every process would hold many matrices.
            first, *others = shared.gather(own)
            for other in others:
                first.merge(other)
            first.to(device)
            self.moments[site][modality][name] = first
        done = shared.gather(self.done)
        self.done = {name: [] for name in CLASSES}
        for one in done:
            self._add(one)
        self.whole = True

    def _add(self, done: Mapping[str, Spans]) -> None:
        self.done = {name: tidy([*spans, *done.get(name, [])]) for name, spans in self.done.items()}

    def _places(self) -> list[tuple[Site, str, str]]:
        return [
            (site, modality, name) for site in self.sites for modality in self.recipe.modalities for name in CLASSES
        ]

    def _named(self) -> list[tuple[str, RunningCovariance]]:
        return [(f"{s}.{modality}.{name}", self.moments[s][modality][name]) for s, modality, name in self._places()]
