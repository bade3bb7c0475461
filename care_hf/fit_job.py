"""What `care fit` does, from names and files to a repaired checkpoint."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import ADAPTER_FILE, save_adapter
from .fitting import fit
from .inspecting import inspect
from .modeling_care import CareForConditionalGeneration
from .opening import Opened, check_source, open_model
from .processes import described_launch
from .prompt_sources import Source, read_source
from .recipe import Recipe
from .samples import Samples, load_samples

KEPT = "care_fit.safetensors"  # what was collected
UPDATING = "care_fit.updating.safetensors"  # the same, with what is being added to it
NEEDED = ("benign", "malicious")


@dataclass(frozen=True, eq=False)
class Plan:
    """All that a fit needs, loaded and checked."""

    opened: Opened
    recipe: Recipe
    named: str
    sources: Mapping[str, Source]
    samples: Mapping[str, Samples]
    diagnosis: Path | None
    out: Path
    adapter: bool
    update: bool

    @property
    def facts(self) -> dict[str, str]:
        """What was found, for people."""
        prompts = {
            name: f"{source}, {len(self.samples[name].pictured)} with images" for name, source in self.sources.items()
        }
        gate = f"; gate at {self.recipe.gate_site(self.opened.model)}" if self.recipe.gate != "none" else ""
        sites = self.recipe.sites if self.recipe.sites == "auto" else self._sites()
        begun = None
        if (self.out / KEPT).is_file():
            begun = (
                "prompts are added to those of the fit" if self.update else "what an earlier run collected is taken up"
            )
        recipe = f"{self.named}: rank {self.recipe.rank} at {sites}{gate}"
        return {**self.opened.facts, "processes": described_launch(), "recipe": recipe, **prompts, "earlier": begun}

    def _sites(self) -> str:
        return ", ".join(map(str, self.recipe.find_sites(self.opened.model)))

    def fit(self) -> CareForConditionalGeneration:
        """Fit; what is collected is kept in `out` from the beginning. Of several processes each does its part."""
        self.out.mkdir(parents=True, exist_ok=True)
        return fit(
            self.opened.model,
            processor=self.opened.processor,
            recipe=self.recipe,
            diagnosis=self.diagnosis,
            **self._files,
            **self.samples,
        )

    def save(self, repaired: CareForConditionalGeneration) -> None:
        """Save into `out`; of several processes the main one does, when they have parted."""
        if self.adapter:
            save_adapter(repaired, self.out)
        else:
            repaired.save_pretrained(self.out)
        if self.update:
            os.replace(self._files["resume"], self._files["update"])

    @property
    def _files(self) -> dict[str, Path]:
        kept = self.out / KEPT
        # The new state takes the place of the old only when all is done: until then both are needed.
        return {"update": kept, "resume": kept.with_name(UPDATING)} if self.update else {"resume": kept}


def prepare(
    model: str,
    prompts: Mapping[str, str | None],
    recipe: str | None,
    out: Path,
    *,
    limit: int | None = None,
    diagnosis: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    update: bool = False,
    adapter: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> Plan:
    """Load everything; what can be wrong at once is found before the model is loaded.

    Args:
        model: folder or Hub id.
        prompts: names of prompts (`prompt_sources.read_source`) by the argument of `fit` that takes them.
        recipe: name or file of a recipe; None for the earlier fit's, or the default.
        out: folder for the checkpoint.
        limit: of every kind of prompts.
        diagnosis: folder of one, for recipes whose sites are "auto".
        changes: fields of the recipe to change.
        update: add the prompts to those of the fit in `out`.
        adapter: save the repair alone.
        device: as `opening.open_model` takes it.
        dtype: likewise.

    Raises:
        ValueError, OSError: a file, a name or a value does not fit; the message says which.
    """
    check_source(model)
    check_out(out, update)
    named, chosen = _recipe(recipe, out if update else None)
    chosen = chosen.replace(**(changes or {}))
    lacking = [name for name in NEEDED if not prompts.get(name)]
    if lacking and not update:
        raise ValueError(
            f"A fit needs {' and '.join(f'--{name}' for name in lacking)}: prompts to grant and to refuse."
        )
    sources = {name: read_source(source, limit) for name, source in prompts.items() if source}
    samples = {name: load_samples(source.prompts, name) for name, source in sources.items()}
    opened = open_model(model, device, dtype, repaired=False)
    return Plan(opened, chosen, named, sources, samples, diagnosis, out, adapter, update)


def _recipe(given: str | None, earlier: Path | None) -> tuple[str, Recipe]:
    """What a recipe is called, and the recipe."""
    if given is not None or earlier is None:
        return given or "gated", Recipe.load(given)
    told = inspect(earlier).recipe
    if told is None:
        raise ValueError(f"{earlier} does not tell its recipe; give it again as --recipe.")
    return "as before", Recipe(**told)


def check_out(out: Path, update: bool = False) -> None:
    """Assert that a folder is new, empty, or of an earlier fit, as it must be to update that.

    Raises:
        FileExistsError: it holds something else.
        FileNotFoundError: there is nothing to update.
    """
    if update and not (out / KEPT).is_file():
        raise FileNotFoundError(
            f"{out} holds no {KEPT}, to which prompts could be added; run the fit without --update."
        )
    if out.is_file():
        raise FileExistsError(f"{out} is a file; name a folder to write the repaired model to.")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in (KEPT, ADAPTER_FILE)):
        raise FileExistsError(f"{out} is not empty and holds no earlier fit; name another folder, or empty it.")
