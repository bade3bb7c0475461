"""Everything that diagnosing a model finds, in one artefact that is saved, loaded, drawn and fitted from."""

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .mediation import Mediation
from .neurons import NeuronRanking
from .resume import model_fingerprint
from .separability import Separability
from .sites import decoder_layers
from .token_attribution import TokenAttribution
from .trace_results import Trace

FORMAT = "care_hf.diagnosis.v1"
VALUES, TENSORS = "diagnosis.json", "diagnosis.safetensors"
PARTS = {"trace": Trace, "mediation": Mediation, "separability": Separability}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What was found; a part that was not measured is None.

    Attributes:
        model: class, fingerprint and number of layers of the model.
        trace: what blocking each place does.
        mediation: what patching each place between refused and jailbroken prompts does.
        neurons: the effects of FFN units.
        separability: how far benign and malicious activations lie apart.
        attributions: of some prompts, by name; loaded ones are without the images' pixels.
        left_out: why a part is missing.
        settings: plain values: numbers of prompts, seeds, versions.
    """

    model: Mapping[str, Any]
    trace: Trace | None = None
    mediation: Mediation | None = None
    neurons: NeuronRanking | None = None
    separability: Separability | None = None
    attributions: Mapping[str, TokenAttribution] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def check_model(self, model: nn.Module) -> None:
        """Refuse another model than the one that was diagnosed.

        Raises:
            ValueError: class, depth or parameters differ.
        """
        told = describe(model)
        other = {name: (self.model.get(name), value) for name, value in told.items() if self.model.get(name) != value}
        if other:
            raise ValueError(f"The diagnosis is of another model (theirs, this one): {other}; diagnose this one.")

    def save(self, folder: str | Path) -> None:
        """Write `VALUES` and, for neurons, `TENSORS` into `folder`, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.neurons.tensors() if self.neurons else {}
        values = {
            "format": FORMAT,
            "model": dict(self.model),
            **{name: part.to_dict() if (part := getattr(self, name)) else None for name in PARTS},
            "neurons": self.neurons.to_dict() if self.neurons else None,
            "attributions": {name: one.to_dict() for name, one in self.attributions.items()},
            "left_out": dict(self.left_out),
            "settings": dict(self.settings),
        }
        _replace(folder / TENSORS, lambda path: save_file(tensors, path, metadata={"format": FORMAT}))
        _replace(folder / VALUES, lambda path: path.write_text(json.dumps(values) + "\n"))

    @classmethod
    def load(cls, folder: str | Path) -> "Diagnosis":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is broken or of another format.
        """
        folder = Path(folder)
        for name in (VALUES, TENSORS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}; give the folder of a diagnosis.")
        try:
            values = json.loads((folder / VALUES).read_text())
            with safe_open(folder / TENSORS, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder} is no whole diagnosis ({error}); copy it again, or diagnose again.") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else None
            raise ValueError(f"{folder / VALUES} has the format {found!r}; this version reads {FORMAT!r}.")
        try:
            parts = {name: kind.from_dict(values[name]) if values[name] else None for name, kind in PARTS.items()}
            neurons = NeuronRanking.from_dict(values["neurons"], tensors) if values["neurons"] else None
            attributions = {name: TokenAttribution.from_dict(one) for name, one in values["attributions"].items()}
            rest = {name: values[name] for name in ("model", "left_out", "settings")}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / VALUES} lacks or garbles a field ({error!r}); diagnose again.") from error
        return cls(**parts, neurons=neurons, attributions=attributions, **rest)

    def markdown(self, figures: Sequence[str] = ()) -> str:
        """Tables of all parts for a model card, with `figures` (file names) above them."""
        parts = [
            f"Diagnosis of {self.model['class']} with {self.model['layers']} decoder layers. {_told(self.settings)}"
        ]
        parts += [f"![{Path(name).stem}]({name})" for name in figures]
        if self.trace:
            for mode in self.trace.blocked:
                title = f"### What blocking each place does ({mode}); percent, nats, 95 % intervals"
                parts += [title, self.trace.table(mode)]
        if self.mediation:
            parts += ["### Through which places refusal reaches the answer", self.mediation.table()]
        if self.separability:
            parts += ["### How far benign and malicious activations lie apart", self.separability.table()]
        if self.neurons:
            told = ", ".join(
                f"{name} {'-' if v is None else f'{v:.2f}'}" for name, v in self.neurons.correlation.items()
            )
            parts += [f"### FFN units; rank correlation of estimate and effect: {told}", self.neurons.table()]
        if self.attributions:
            parts.append("### What single answers hang on")
            parts += [f"{name}: {one.html()}" for name, one in self.attributions.items()]
        parts += [f"No {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n\n".join(parts) + "\n"


def describe(model: nn.Module) -> dict[str, Any]:
    """What tells a model from others."""
    layers = len(decoder_layers(model))
    return {"class": type(model).__name__, "layers": layers, "fingerprint": model_fingerprint(model)}


def versions() -> dict[str, str]:
    """Of the packages that a diagnosis depends on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in settings.items())


def _replace(path: Path, write) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    write(partial)
    os.replace(partial, path)
