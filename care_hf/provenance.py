"""Where a repair comes from: base, data, versions; kept with it as strings, and told in reproduce.json."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import nn

from .collection import PromptFacts
from .configuration_care import hub_name
from .devices import is_spread
from .report import environment
from .resume import model_fingerprint
from .samples import Samples
from .subspace import SafetySubspaces

FORMAT = "care_hf.reproduce.v1"
TOLD = ("recipe", "prompts", "calibration", "base", "data", "environment")  # of an origin, those that are JSON


def origin(model: nn.Module, samples: Mapping[str, Samples | PromptFacts], **settings: str) -> dict[str, str]:
    """What a fit knows of its base, its prompts and its surroundings, as `SafetySubspaces.metadata` holds it."""
    data = {name: {"n": len(items), "sha256": data_digest(items)} for name, items in samples.items()}
    told = {"base": base(model), "data": data, "environment": environment()}
    return {**{name: json.dumps(value) for name, value in told.items()}, **settings}


def data_digest(samples: Samples | PromptFacts) -> str:
    """A hash of all that a fit sees of prompts: texts, pixels, kinds and groups, in their order."""
    return hashlib.sha256(json.dumps([samples.digests, samples.kinds, samples.groups]).encode()).hexdigest()


def base(model: nn.Module) -> dict[str, str | None]:
    """Name and commit on the Hub, class, and `resume.model_fingerprint` of an unrepaired model; None where unknown."""
    name = hub_name(model.config)
    return {
        "name": name,
        "revision": _revision(name),
        "class": type(model).__name__,
        "fingerprint": _fingerprint(model),
    }


def _revision(name: str | None) -> str | None:
    """The commit of a base that was loaded from the Hub, if there is but one that it can have been."""
    cached = try_to_load_from_cache(name, "config.json") if name else None
    if not isinstance(cached, str):
        return None
    snapshots = [path.name for path in Path(cached).parent.parent.iterdir()]
    return snapshots[0] if len(snapshots) == 1 else None


def _fingerprint(model: nn.Module) -> str | None:
    # Values that lie on several processes cannot be read by one.
    return None if is_spread(model) else model_fingerprint(model)


def reproduction(model) -> dict[str, Any]:
    """All that is needed to make a repaired model again, and hashes to tell whether it is the same; plain values.

    Under "hashes": "base", of the base as it was fitted on, if it was; "saved base", as it is now; "repair", that of
    `SafetySubspaces.digest`; "data", by the arguments of `fit`.
    """
    told = read_origin(model.config.origin)
    here = base(model.vlm)
    known = told.get("base", here)
    data = told.get("data", {})
    hashes = {
        "base": known["fingerprint"],
        "saved base": here["fingerprint"],
        "repair": SafetySubspaces.from_model(model).digest,
        "data": {name: one["sha256"] for name, one in data.items()},
    }
    recipe = told.get("recipe")
    return {
        "format": FORMAT,
        "base": {"name": here["name"] or known["name"], "revision": here["revision"] or known["revision"]},
        "class": known["class"],
        "recipe": recipe,
        "seeds": {} if recipe is None else {"fit": recipe["seed"]},
        "prompts": {name: one["n"] for name, one in data.items()} or told.get("prompts", {}),
        "origin": {name: value for name, value in told.items() if name not in TOLD},
        "hashes": hashes,
        "environment": {"fit": told.get("environment"), "saved": environment()},
    }


def read_origin(kept: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of a repair, its JSON read; what cannot be read is left out."""
    told = {}
    for name, value in kept.items():
        try:
            told[name] = json.loads(value) if name in TOLD else value
        except ValueError:
            continue
    return told
