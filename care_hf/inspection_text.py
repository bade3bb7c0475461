"""What is known of a repair, as labelled lines of text for a terminal."""

from collections.abc import Mapping
from typing import Any

from .recipe import RECIPES

Rows = list[tuple[str, str]]
Sections = list[tuple[str, Rows]]

GROUPS = {
    "last": "last token of the prompt",
    "response": "tokens of the answer",
    "visual": "visual tokens",
    "text": "text tokens",
}
SHOWN = 8  # eigenvalues in a line


def told(known: Mapping[str, Any]) -> Sections:
    """The fields of an `inspecting.Inspection` in sections; what is not known is left out."""
    sections = [
        ("Checkpoint", _checkpoint(known)),
        ("Base", _base(known["base"], known["adapters"])),
        ("Repair", _repair(known)),
        *[(f"Site {site['site']}", _site(site, known["strength"] is None)) for site in known["sites"]],
        ("Gate", _gate(known["gate"])),
        ("Recipe", _recipe(known["recipe"])),
        ("Fitted on", _fitted_on(known)),
        ("Size", _sizes(known["sizes"])),
    ]
    return [(heading, rows) for heading, rows in sections if rows]


def _rows(**named: Any) -> Rows:
    """Labels with "_" for spaces; what is None is left out."""
    return [(label.replace("_", " "), str(value)) for label, value in named.items() if value is not None]


def _checkpoint(known: Mapping[str, Any]) -> Rows:
    whole = "bit for bit what was saved" if known["verified"] else "this format has no hash to tell by"
    rows = _rows(source=known["source"], kind=known["kind"], format=known["format"])
    return [*rows, ("digest of the repair", known["digest"]), ("checked", whole)]


def _base(base: Mapping[str, Any], adapters: Mapping[str, Any]) -> Rows:
    name = base["name"] if base["revision"] is None else f"{base['name']} at {base['revision']}"
    layers, size = base["layers"], base["hidden_size"]
    decoder = None if layers is None else f"{layers} layers, hidden size {size}, {base['vocabulary']} tokens"
    rows = _rows(name=name, model=base["class"] or base["model_type"], decoder=decoder)
    rows += _rows(dtype=base["dtype"], quantised=base["quantised"])
    for adapter, one in adapters.items():
        rank = "" if one["rank"] is None else f", rank {one['rank']}"
        rows.append((f"adapter {adapter}", f"{one['kind']}{rank}, {'active' if one['active'] else 'not active'}"))
    return rows


def _repair(known: Mapping[str, Any]) -> Rows:
    strength = "differs, see the sites" if known["strength"] is None else _number(known["strength"])
    weight = None if known["fusion_weight"] is None else f"{_number(known['fusion_weight'])} of the visual correction"
    sites = ", ".join(site["site"] for site in known["sites"])
    return _rows(sites=sites, of=known["scope"], strength=strength, fusion=known["fusion"], fusion_weight=weight)


def _site(site: Mapping[str, Any], with_strength: bool) -> Rows:
    rows = [("strength", _number(site["strength"]))] if with_strength else []
    for name, one in site["subspaces"].items():
        kind = "oblique" if one["oblique"] else "orthogonal"
        anchors = f", {one['anchors']} anchors" if one["anchors"] > 1 else ""
        rows.append((GROUPS[name], f"rank {one['rank']}, {kind}, beta {_number(one['beta'])}{anchors}"))
        rows += [(f"  {label}", text) for label, text in _report(one)]
    return rows


def _report(one: Mapping[str, Any]) -> Rows:
    rows, values = [], one["eigenvalues"]
    if isinstance(values, (list, tuple)) and values and all(map(_is_number, values)):
        more = f", ... ({len(values)})" if len(values) > SHOWN else ""
        rows.append(("eigenvalues", ", ".join(map(_number, values[:SHOWN])) + more))
        if _is_number(one.get("total")) and one["total"] > 0:
            rows.append(("of the deviation", f"{100 * sum(values) / one['total']:.1f} %"))
    if _is_number(one["shrinkage"]):
        rows.append(("shrinkage", _number(one["shrinkage"])))
    counts = {"benign": "benign", "malicious": "malicious", "tokens": "complying"}
    fitted = [f"{one[name]:,} {word}" for name, word in counts.items() if _is_number(one.get(name))]
    return rows + ([("tokens", ", ".join(fitted))] if fitted else [])


def _gate(gate: Mapping[str, Any] | None) -> Rows:
    if gate is None:
        return [("gate", "none: every prompt is repaired")]
    detectors = (
        f"{gate['required']} required, {gate['alarms']} alarms, {gate['pictured']} more for prompts with an image"
    )
    count = gate["required"] + gate["alarms"] + gate["pictured"]
    rows = _rows(reads=gate["site"], detectors=detectors if count else "none: it fires at the end of every prompt")
    rows.append(("at", f"the end of the prompt, token ids {', '.join(map(str, gate['prompt_end']))}"))
    return rows + _calibration(gate["calibration"] or {})


def _calibration(calibration: Mapping[str, Any]) -> Rows:
    """On held-out prompts: the target of false alarms, and what fired, by class."""
    rows = []
    if _is_number(calibration.get("target")):
        rows.append(
            ("false alarms", f"{_number(100 * calibration['target'])} % of a kind of harmless prompts, as aimed at")
        )
    counts: dict[str, list[int]] = {}
    kinds = calibration.get("kinds")
    for name, row in kinds.items() if isinstance(kinds, Mapping) else ():
        if isinstance(row, Mapping) and all(_is_number(row.get(key)) for key in ("fires", "n")):
            total = counts.setdefault(str(name).partition("/")[0], [0, 0])
            total[0], total[1] = total[0] + row["fires"], total[1] + row["n"]
    return rows + [(f"fired, {of}", f"{fires} of {n} held-out prompts") for of, (fires, n) in counts.items()]


def _fitted_on(known: Mapping[str, Any]) -> Rows:
    counts = {name: one.get("n") for name, one in (known["data"] or {}).items() if isinstance(one, Mapping)}
    prompts = {**counts, **(known["prompts"] or {})}
    rows = _rows(prompts=", ".join(f"{n} {name}" for name, n in prompts.items()) or None)
    rows += _rows(with_=", ".join(f"{name} {v}" for name, v in (known["environment"] or {}).items()) or None)
    return [(label.strip(), text) for label, text in rows + _flat(known["origin"])]


def _recipe(recipe: Mapping[str, Any] | None) -> Rows:
    """By the recipe of this version that it is nearest to, and what differs."""
    if recipe is None:
        return []
    changes = {}
    for name, known in RECIPES.items():
        plain = known.to_dict()
        changes[name] = {field: value for field, value in recipe.items() if field not in plain or plain[field] != value}
    nearest = min(changes, key=lambda name: len(changes[name]))
    return [("recipe", f"{nearest}, but for" if changes[nearest] else nearest), *_flat(changes[nearest])]


def _flat(values: Mapping[str, Any] | None) -> Rows:
    return [
        (str(name), ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
        for name, value in (values or {}).items()
    ]


def _sizes(sizes: Mapping[str, Any]) -> Rows:
    rows = []
    for name in ("base", "repair"):
        one = sizes[name]
        if one["parameters"] is not None:
            rows.append((name, f"{one['parameters']:,} parameters, {told_bytes(one['bytes'])}"))
    share = sizes["share"]
    return rows if share is None else [*rows, ("share", f"{100 * share:.3g} % of the base's parameters")]


def told_bytes(count: int) -> str:
    """Bytes as words: "512 B", "2.91 MB"."""
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.{3 if power else 0}{'g' if power else 'f'}} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
