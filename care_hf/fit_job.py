"""What `care fit` does, from names and files to a repaired checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic import replace_file
from .checkpoint import ADAPTER_FILE, save_adapter
from .fitting import fit
from .modeling_care import CareForConditionalGeneration
from .opening import Opened, check_source, open_model
from .prompt_sources import Source, read_source
from .recipe import Recipe
from .samples import Samples, load_samples

KEPT = "care_fit.safetensors"  # what was collected
NOTES = "care_fit.json"  # which command it belongs to
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

    @property
    def facts(self) -> dict[str, str]:
        """What was found, for people."""
        prompts = {
            name: f"{source}, {len(self.samples[name].pictured)} with images" for name, source in self.sources.items()
        }
        gate = f"; gate at {self.recipe.gate_site(self.opened.model)}" if self.recipe.gate != "none" else ""
        sites = self.recipe.sites if self.recipe.sites == "auto" else self._sites()
        begun = "what an earlier run collected is taken up" if (self.out / KEPT).is_file() else None
        recipe = f"{self.named}: rank {self.recipe.rank} at {sites}{gate}"
        return {**self.opened.facts, "recipe": recipe, **prompts, "resumes": begun}

    def _sites(self) -> str:
        return ", ".join(map(str, self.recipe.find_sites(self.opened.model)))

    def run(self) -> CareForConditionalGeneration:
        """Fit, and save into `out`; what is collected is kept there from the beginning."""
        self.out.mkdir(parents=True, exist_ok=True)
        notes = {"model": self.opened.source, "recipe": self.recipe.to_dict()}
        replace_file(self.out / NOTES, json.dumps(notes, indent=1).encode())
        repaired = fit(
            self.opened.model,
            processor=self.opened.processor,
            recipe=self.recipe,
            diagnosis=self.diagnosis,
            resume=self.out / KEPT,
            **self.samples,
        )
        if self.adapter:
            save_adapter(repaired, self.out)
        else:
            repaired.save_pretrained(self.out)
        return repaired


def prepare(
    model: str,
    prompts: Mapping[str, str | None],
    recipe: str,
    out: Path,
    *,
    limit: int | None = None,
    diagnosis: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    adapter: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> Plan:
    """Load everything; what can be wrong at once is found before the model is loaded.

    Args:
        model: folder or Hub id.
        prompts: names of prompts (`prompt_sources.read_source`) by the argument of `fit` that takes them.
        recipe: name or file of a recipe.
        out: folder for the checkpoint.
        limit: of every kind of prompts.
        diagnosis: folder of one, for recipes whose sites are "auto".
        changes: fields of the recipe to change.
        adapter: save the repair alone.
        device: as `opening.open_model` takes it.
        dtype: likewise.

    Raises:
        ValueError, OSError: a file, a name or a value does not fit; the message says which.
    """
    chosen = Recipe.load(recipe or None).replace(**(changes or {}))
    check_source(model)
    check_out(out)
    lacking = [name for name in NEEDED if not prompts.get(name)]
    if lacking:
        raise ValueError(
            f"A fit needs {' and '.join(f'--{name}' for name in lacking)}: prompts to grant and to refuse."
        )
    sources = {name: read_source(source, limit) for name, source in prompts.items() if source}
    samples = {name: load_samples(source.prompts, name) for name, source in sources.items()}
    opened = open_model(model, device, dtype, repaired=False)
    return Plan(opened, chosen, recipe or "gated", sources, samples, diagnosis, out, adapter)


def check_out(out: Path) -> None:
    """Assert that a folder is new, empty, or of an earlier fit.

    Raises:
        FileExistsError: it holds something else.
    """
    if out.is_file():
        raise FileExistsError(f"{out} is a file; name a folder to write the repaired model to.")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in (NOTES, ADAPTER_FILE)):
        raise FileExistsError(f"{out} is not empty and holds no earlier fit; name another folder, or empty it.")
