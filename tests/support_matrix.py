"""Which family can do what, written down from the tests that show it: ``pytest --support-matrix docs/support.md``.

Tests marked ``supports("what")`` and parametrised by `family` are its cells, each as good as the worst of them, and
what stock transformers cannot do, the test skips with the reason.
"""

from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

SIGNS = {"not applicable": "-", "passed": "yes", "skipped": "stock cannot", "failed": "**no**"}
HEAD = """# What works on which family

Written by `python -m pytest tests/test_families.py --support-matrix docs/support.md`, never by hand; transformers {},
torch {}, on a CPU. Each family is a tiny random model of the real architecture, its vision tower deeper than its text
tower. "yes": the tests passed for a repair by modality of FFNs and for the gated repair of whole layers.
"stock cannot": nor can the unrepaired model, for the reason below. "-": there are no visual tokens in the sequence.
"""


class Matrix:
    """Collects outcomes as tests finish, and writes them at the end.

    Args:
        path: where to.
    """

    def __init__(self, path: Path):
        self.path = path
        self.cells: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.reasons: dict[tuple[str, str], set[str]] = defaultdict(set)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        mark = item.get_closest_marker("supports")
        if mark is None or (report.when != "call" and report.passed):
            return
        cell = item.callspec.params["family"].name, mark.args[0]
        self.cells[cell].add(report.outcome)
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else ""
        if reason == "-":
            self.cells[cell] = {"not applicable"}
        elif reason:
            self.reasons[mark.args[0], reason].add(cell[0])

    def pytest_sessionfinish(self):
        families, columns = (list(dict.fromkeys(names)) for names in zip(*self.cells, strict=True))
        lines = [HEAD.format(version("transformers"), version("torch"))]
        lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for family in families:
            outcomes = (self.cells.get((family, column), set()) for column in columns)
            lines.append(f"| {family} | " + " | ".join(map(_sign, outcomes)) + " |")
        lines += ["", "## What stock transformers cannot do", ""]
        lines += [
            f"- {column}, {', '.join(f for f in families if f in names)}: {reason}"
            for (column, reason), names in self.reasons.items()
        ]
        self.path.write_text("\n".join(lines) + "\n")


def _sign(outcomes: set[str]) -> str:
    return next((sign for outcome, sign in reversed(SIGNS.items()) if outcome in outcomes), "not tested")


def pytest_addoption(parser):
    parser.addoption("--support-matrix", type=Path, help="write the table of what works on which family to this file")


def pytest_configure(config):
    config.addinivalue_line("markers", "supports(what): a cell of the support matrix, for the parameter `family`")
    if config.getoption("--support-matrix"):
        if config.getoption("numprocesses", None):
            raise pytest.UsageError("--support-matrix needs all tests in one process; add -n 0.")
        config.pluginmanager.register(Matrix(config.getoption("--support-matrix")))
