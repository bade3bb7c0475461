"""What is known of a repair: the record that `care info` shows, made from the repair and what was told with it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .gating import TURN
from .inspection_text import Sections, told
from .projection import MODALITIES
from .sites import Site
from .subspace import SafetySubspaces
from .tensor_files import Stored

JSON = ("recipe", "prompts", "calibration", "base", "data", "environment", "reports")  # of an origin, what is JSON


@dataclass(frozen=True)
class Inspection:
    """What is known of a repair.

    Attributes:
        source: what was inspected.
        kind: "repaired checkpoint", "adapter" (which knows its base), or "subspaces" (which does not).
        format: the number or name of its format.
        base: "name" and "revision" on the Hub, "class", "model_type", "layers", "hidden_size", "vocabulary", "dtype",
            "quantised"; None where it is not known.
        sites: one dict a site: "site", "strength", and "subspaces", by group a dict of "rank", "beta", "oblique",
            "anchors" (1, or the repaired steps of the answer), "eigenvalues", "shrinkage" and whatever else the fit
            reported; None where it did not.
        gate: "site", "required", "alarms", "pictured", "prompt_end", "calibration" (see `detectors.calibration`); None
            if every prompt is repaired.
        scope: which tokens are repaired, in words.
        fusion, fusion_weight: of two modalities; None where nothing is fused.
        strength: of all sites; None if they differ.
        recipe, prompts, data, environment: of the fit, if it told.
        origin: what else is known.
        adapters: of PEFT in the base: by name "kind", "rank" and "active".
        sizes: of "base" and "repair" a dict of "parameters" and "bytes", and "share", of the base's parameters. The
            base's are those that the checkpoint stores, or, for an adapter, that it had when the adapter was saved.
        digest: of the repair, equal for equal repairs, see `SafetySubspaces.digest`.
        verified: whether it is bit for bit what was saved; None if the format has no hash to tell by.
    """

    source: str
    kind: str
    format: int | str
    base: dict[str, Any]
    sites: list[dict[str, Any]]
    gate: dict[str, Any] | None
    scope: str
    fusion: str | None
    fusion_weight: float | None
    strength: float | None
    recipe: dict[str, Any] | None
    prompts: dict[str, Any] | None
    data: dict[str, Any] | None
    environment: dict[str, Any] | None
    origin: dict[str, Any]
    adapters: dict[str, dict[str, Any]]
    sizes: dict[str, Any]
    digest: str
    verified: bool | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    def sections(self) -> Sections:
        """For a terminal: ``[(heading, [(label, value), ...]), ...]``, all of it text; nothing that is not known."""
        return told(self.to_dict())


def sizes(base: Sequence[Stored] | None, repair: Sequence[Stored]) -> dict[str, Any]:
    """See `Inspection`, of the tensors of both; None if those of the base are not known."""

    def of(tensors: Sequence[Stored] | None) -> dict[str, int | None]:
        if tensors is None:
            return {"parameters": None, "bytes": None}
        return {"parameters": sum(t.numbers for t in tensors), "bytes": sum(t.bytes for t in tensors)}

    whole, part = of(base), of(repair)
    return {"base": whole, "repair": part, "share": part["parameters"] / whole["parameters"] if base else None}


def describe(
    subspaces: SafetySubspaces, strengths: Mapping[str, float], base: Mapping[str, Any], **known: Any
) -> Inspection:
    """What there is to know of a repair.

    Args:
        subspaces: the repair, with its origin as metadata.
        strengths: of every site ("sites.16.ffn").
        base: what is known of it, see `Inspection`; what is None is asked of the origin.
        known: the other fields.
    """
    origin = {name: _parsed(name, value) for name, value in subspaces.metadata.items()}
    fitted_on = origin.pop("base", None)
    fitted_on = fitted_on if isinstance(fitted_on, Mapping) else {}
    base = {name: fitted_on.get(name) if value is None else value for name, value in base.items()}
    of_fit = {name: _mapping(origin.pop(name, None)) for name in ("recipe", "prompts", "data", "environment")}
    reports, calibration = (_mapping(origin.pop(name, None)) for name in ("reports", "calibration"))
    fused = any(len(by_group) == 2 and set(by_group) == set(MODALITIES) for by_group in subspaces.sites.values())
    by_token = any(set(by_group) <= set(MODALITIES) for by_group in subspaces.sites.values())
    return Inspection(
        base=base | {"revision": fitted_on.get("revision")},
        sites=[_site(site, strengths[f"sites.{site}"], subspaces, reports or {}) for site in sorted(subspaces.sites)],
        gate=_gate(subspaces, calibration),
        scope=_scope(subspaces),
        fusion=subspaces.fusion if by_token else None,
        fusion_weight=subspaces.fusion_weight if fused and subspaces.fusion == "constant" else None,
        strength=next(iter(strengths.values())) if len(set(strengths.values())) == 1 else None,
        origin=origin,
        digest=subspaces.digest,
        **of_fit,
        **known,
    )


def _parsed(name: str, value: Any) -> Any:
    """What an origin says under a name: of no use, if it cannot be read, but no harm either."""
    if name not in JSON or not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return value


def _mapping(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _site(site: Site, strength: float, subspaces: SafetySubspaces, reports: Mapping[str, Any]) -> dict[str, Any]:
    groups = {}
    for name, subspace in subspaces.sites[site].items():
        report = _mapping(reports.get(f"{site}.{name}")) or {}
        groups[name] = {
            "rank": subspace.rank,
            "beta": subspace.beta,
            "oblique": subspace.reader is not None,
            "anchors": subspace.steps or 1,
            "eigenvalues": None,
            "shrinkage": None,
            **report,
        }
    return {"site": str(site), "strength": strength, "subspaces": groups}


def _gate(subspaces: SafetySubspaces, calibration: dict[str, Any] | None) -> dict[str, Any] | None:
    gate = subspaces.gate
    if gate is None:
        return None
    counts = {name: getattr(gate, name) for name in ("required", "alarms", "pictured")}
    described = {"site": str(subspaces.gate_site), **counts, "prompt_end": list(gate.prompt_end)}
    return {**described, "calibration": calibration or None}


def _scope(subspaces: SafetySubspaces) -> str:
    groups = [by_group for by_group in subspaces.sites.values() if set(by_group) <= set(TURN)]
    if not groups:
        return "every token" if subspaces.scope == "all" else "every token of the prompt"
    steps = max(s.steps for by_group in groups for s in by_group.values())
    places = ["the last token of the prompt"] if any("last" in by_group for by_group in groups) else []
    return " and ".join(places + ([f"the first {steps} tokens of the answer"] if steps else []))
