"""Everything that diagnosing a model finds, in one artefact that is saved, loaded, drawn and fitted from."""

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from .judges import VERDICTS
from .mediation import Mediation
from .neurons import NeuronRanking
from .pair_runs import GROUPS
from .resume import model_fingerprint
from .separability import Separability
from .sites import decoder_layers
from .token_attribution import TokenAttribution
from .trace_results import Trace

FORMAT = "care_hf.diagnosis.v1"
VALUES, TENSORS = "diagnosis.json", "diagnosis.safetensors"
PARTS = {"trace": Trace, "mediation": Mediation, "separability": Separability}
NON_FINITE = "non-finite"  # an infinite number or NaN, which JSON does not have, is {NON_FINITE: "inf"} there


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
        """Write `VALUES` and, of neurons, `TENSORS` into `folder`, over what is there, once both are whole.

        Raises:
            TypeError: a value is not plain; nothing is written.
        """
        folder = Path(folder)
        tensors = save_tensors(self.neurons.tensors() if self.neurons else {}, metadata={"format": FORMAT})
        values = {
            "format": FORMAT,
            "tensors": hashlib.sha256(tensors).hexdigest(),
            "model": dict(self.model),
            **{name: part.to_dict() if (part := getattr(self, name)) else None for name in PARTS},
            "neurons": self.neurons.to_dict() if self.neurons else None,
            "attributions": {name: one.to_dict() for name, one in self.attributions.items()},
            "left_out": dict(self.left_out),
            "settings": dict(self.settings),
        }
        files = {TENSORS: tensors, VALUES: f"{json.dumps(_strict(values), allow_nan=False)}\n".encode()}
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / f"{name}.partial").write_bytes(data)
        for name in files:
            os.replace(folder / f"{name}.partial", folder / name)

    @classmethod
    def load(cls, folder: str | Path) -> "Diagnosis":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is broken or of another format, or the two are not of one diagnosis.
        """
        folder = Path(folder)
        for name in (VALUES, TENSORS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}; give the folder of a diagnosis.")
        path = folder / VALUES
        try:
            values = json.loads(path.read_bytes(), object_hook=_revived, parse_constant=_refuse_constant)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is no whole JSON ({error}); copy it again, or diagnose again.") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else None
            raise ValueError(f"{path} has the format {found!r}; this version reads {FORMAT!r}.")
        data = (folder / TENSORS).read_bytes()
        if values.get("tensors") != hashlib.sha256(data).hexdigest():
            raise ValueError(
                f"{folder / TENSORS} is damaged, or of another diagnosis than {VALUES}; copy both again, or diagnose "
                "again."
            )
        try:
            tensors = load_tensors(data)
            parts = {name: kind.from_dict(values[name]) if values[name] else None for name, kind in PARTS.items()}
            neurons = NeuronRanking.from_dict(values["neurons"], tensors) if values["neurons"] else None
            attributions = {name: TokenAttribution.from_dict(one) for name, one in values["attributions"].items()}
            rest = {name: values[name] for name in ("model", "left_out", "settings")}
            found = cls(**parts, neurons=neurons, attributions=attributions, **rest)
            _check(found)
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} lacks or garbles a field ({error!r}); diagnose again.") from error
        return found

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


# What strict JSON holds


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {NON_FINITE: str(float(value))}
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value


def _revived(found: dict[str, Any]) -> Any:
    return float(found[NON_FINITE]) if set(found) == {NON_FINITE} else found


def _refuse_constant(token: str) -> None:
    raise ValueError(f"{token} is no JSON")


# Whether the fields that were read fit one another


def _check(found: Diagnosis) -> None:
    told = found.model["class"], found.model["layers"], found.model["fingerprint"]
    _assert([type(value) for value in told] == [str, int, str], "model")
    for name in ("left_out", "settings"):
        _assert(isinstance(getattr(found, name), dict), name)
    if found.trace:
        plain = found.trace.unblocked
        numbers = len(plain.malicious), len(plain.benign)
        for one in (plain, *(one for by in found.trace.blocked.values() for one in by.values())):
            _assert(set(one.malicious) | set(one.benign) <= set(VERDICTS), "trace")
            _assert((len(one.malicious), len(one.benign), len(one.kept)) == (*numbers, numbers[1]), "trace")
            _assert(_numbers(one.log_odds, numbers[0]) and _numbers(one.divergence, numbers[1]), "trace")
    if found.mediation:
        pairs = len(found.mediation.refused)
        for values in (found.mediation.refused, found.mediation.jailbroken):
            _assert(_numbers(values, pairs), "mediation")
        for by in found.mediation.effects.values():
            _assert(set(by) == set(GROUPS), "mediation")
            for values in (values for one in by.values() for values in (one.indirect, one.direct)):
                _assert(len(values) == pairs and _numbers([v for v in values if v is not None]), "mediation")
    if found.neurons:
        for neuron in found.neurons.verified:
            known = found.neurons.estimates[neuron.layer]
            _assert(known.ndim == 1 and known.is_floating_point() and 0 <= neuron.unit < len(known), "neurons")
            _assert(_numbers([neuron.estimate, neuron.effect]), "neurons")
    for one in found.attributions.values():
        shapes = {tuple(values.shape) for values in (one.positions, one.visual, one.scores)}
        _assert(shapes == {(len(one.tokens),)} and all(isinstance(token, str) for token in one.tokens), "attributions")


def _assert(right: bool, name: str) -> None:
    if not right:
        raise ValueError(f"{name!r} does not fit together")


def _numbers(values: Any, count: int | None = None) -> bool:
    return isinstance(values, list) and count in (None, len(values)) and all(type(v) in (int, float) for v in values)
