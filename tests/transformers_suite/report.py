"""What a run of transformers' suite gave: read, compared test by test, and written."""

import ast
import platform
import re
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

STOCK = "StockLlavaTest"
OURS = {"CareTest": "adaptive", "RoutedCareTest": "routed", "GatedCareTest": "gated"}
CLASSES = {"LlavaForConditionalGeneration", "CareForConditionalGeneration", "LlavaConfig", "CareConfig"}
WORST_FIRST = ("failed", "passed", "skipped")  # of the subtests of a test


@dataclass(frozen=True)
class Outcome:
    """Of one test: "passed", "failed" or "skipped", and why."""

    kind: str
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """Outcomes by class and test name, and where ours are worse than stock LLaVA's."""

    found: dict[str, dict[str, Outcome]]
    worse: list[tuple[str, str]]
    unexplained: list[tuple[str, str]]


def outcomes(report: Path) -> dict[str, dict[str, Outcome]]:
    """Outcomes by class and name, from pytest's report; a test fails if one of its subtests does."""
    found: dict[str, dict[str, Outcome]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        here = found.setdefault(case.get("classname").rpartition(".")[2], {})
        parts = [part for part in case if part.tag in ("failure", "error", "skipped")]
        kinds = {"failed" if part.tag != "skipped" else "skipped": part.get("message") or "" for part in parts}
        kind = next((kind for kind in WORST_FIRST if kind in kinds), "passed")
        outcome, known = Outcome(kind, " ".join(kinds.get(kind, "").split())), here.get(case.get("name"))
        if known is None or WORST_FIRST.index(kind) < WORST_FIRST.index(known.kind):
            here[case.get("name")] = outcome
    if set(found) != {STOCK, *OURS}:
        raise SystemExit(f"pytest ran {sorted(found)}; expected the classes {sorted({STOCK, *OURS})}.")
    return found


def compare(found: dict[str, dict[str, Outcome]]) -> Comparison:
    """Find failures that stock LLaVA does not have, and skips without a reason."""
    stock, ours = found[STOCK], {name: found[name] for name in OURS}
    absent = Outcome("skipped")
    worse = [
        (cls, name)
        for cls, tests in ours.items()
        for name in sorted({*tests, *stock})
        if tests.get(name, absent).kind == "failed" and stock.get(name, absent).kind != "failed"
    ]
    unexplained = [
        (cls, name)
        for cls, tests in ours.items()
        for name in sorted({*tests, *stock})
        if tests.get(name, absent).kind == "skipped" and not tests.get(name, absent).why
    ]
    return Comparison(found, worse, unexplained)


def adapted(module: Path) -> dict[str, str]:
    """The tests that ours changes, and their docstrings."""
    classes = [node for node in ast.parse(module.read_text()).body if isinstance(node, ast.ClassDef)]
    return {
        node.name: " ".join((ast.get_docstring(node) or "").split())
        for owner in classes
        if owner.name in OURS
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def written(comparison: Comparison, stubbed: list[str], module: Path) -> str:
    """The report, Markdown."""
    lacking = " and ".join(f"`tests/{name}`" for name in stubbed)
    parts = [
        "# transformers' own common model tests",
        f"`python tests/transformers_suite/run.py` with transformers {version('transformers')}, torch "
        f"{version('torch')}, Python {platform.python_version()}, care_hf {version('care_hf')}. The tests are those of "
        "transformers' source archive, `tests/test_modeling_common.py`; all classes ran in one pytest, on equal "
        "tiny LLaVAs." + (f" The archive lacks {lacking}, so tests defined there did not run." if lacking else ""),
        _counts(comparison),
        "## Where the wrapper and stock LLaVA differ",
        _differences(comparison),
        "## Failures that both have",
        _shared_failures(comparison),
        "## Tests that run with a change of ours",
        "\n".join(f"- `{name}`: {why}" for name, why in adapted(module).items()),
        "## Skips",
        "The suite's own reasons, but for ours above; *the model* stands for the name of its class. Of every composite "
        "model the suite says that it does not support SDPA, where it has another test for them.",
        _skips(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _counts(comparison: Comparison) -> str:
    def row(cls: str, label: str) -> list[str]:
        kinds = Counter(outcome.kind for outcome in comparison.found[cls].values())
        return [label, *(str(kinds[kind]) for kind in ("passed", "failed", "skipped"))]

    rows = [row(STOCK, "stock LLaVA"), *(row(cls, f"repaired, {label}") for cls, label in OURS.items())]
    return _table(["", "passed", "failed", "skipped"], rows)


def _differences(comparison: Comparison) -> str:
    stock, rows = comparison.found[STOCK], {}
    for cls, label in OURS.items():
        for name, outcome in sorted(comparison.found[cls].items()):
            kind = stock[name].kind if name in stock else "absent"
            if outcome.kind != kind:
                rows.setdefault((name, kind, outcome.kind, _cell(outcome.why)), []).append(label)
    if not rows:
        return "Nowhere."
    lines = [[f"`{name}`", "; ".join(labels), *rest] for (name, *rest), labels in rows.items()]
    return _table(["test", "repair", "stock LLaVA", "wrapper", "why"], lines)


def _shared_failures(comparison: Comparison) -> str:
    failures = [
        {name: outcome.why for name, outcome in tests.items() if outcome.kind == "failed"}
        for tests in (comparison.found[cls] for cls in (STOCK, *OURS))
    ]
    shared = [name for name in failures[0] if any(name in ours for ours in failures[1:])]
    return "\n".join(f"- `{name}`: {_cell(failures[0][name])}" for name in shared) or "None."


def _skips(comparison: Comparison) -> str:
    by_reason: dict[str, dict[str, set[str]]] = {}
    for cls, tests in comparison.found.items():
        for name, outcome in tests.items():
            if outcome.kind == "skipped":
                by_reason.setdefault(_general(outcome.why), {}).setdefault(cls, set()).add(name)
    rows = [
        [
            _cell(reason) or "none given",
            *(str(len(by_class.get(cls, ()))) for cls in (STOCK, *OURS)),
            ", ".join(f"`{name}`" for name in sorted(set().union(*by_class.values()))),
        ]
        for reason, by_class in sorted(by_reason.items())
    ]
    return _table(["reason", "stock LLaVA", *OURS.values(), "tests"], rows)


def _general(reason: str) -> str:
    named = "|".join(CLASSES)
    return re.sub(rf"(This model|Model|({named})( class)?)\b", "the model", reason)


def _cell(text: str) -> str:
    shortened = text if len(text) <= 400 else text[:400] + " ..."
    return shortened.replace("|", "\\|")
