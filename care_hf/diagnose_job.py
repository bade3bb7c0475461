"""What `care diagnose` does, from names and files to an artefact, its tables and its figures."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .attribution_figures import draw
from .diagnosing import diagnose
from .diagnosis import Diagnosis
from .diagnosis_figures import draw_mediation, draw_neurons, draw_separability, draw_trace
from .judges import Judge, StrictJudge, WordJudge
from .loaders import load_suite
from .opening import open_model
from .suite import Suite
from .testbed import load_testbed
from .testbed.suite import load_suite as load_world
from .testbed.world import REFUSAL, SPLITS

SUFFIXES = (".png", ".svg")
NEEDED = {"matplotlib": "matplotlib", "sklearn": "scikit-learn"}  # what is imported, and how it is installed


@dataclass(frozen=True, eq=False)
class Plan:
    """All that a diagnosis needs, loaded and checked."""

    model: Any
    processor: Any
    suite: Suite
    judge: Judge
    options: dict[str, Any]

    @property
    def malicious(self) -> list:
        """Harmful requests in plain words and attacks."""
        return [*self.suite.harmful, *(case for cases in self.suite.attacks.values() for case in cases)]

    @property
    def benign(self) -> list:
        """Requests that should be answered."""
        return [case for cases in self.suite.benign.values() for case in cases]

    @property
    def summary(self) -> str:
        """What will be done, in a line."""
        return _told(self.suite)

    def run(self, out: Path) -> Diagnosis:
        """Do it, and write artefact, figures and tables into `out`."""
        found = diagnose(self.model, self.malicious, self.benign, self.processor, self.judge, out=out, **self.options)
        found.save(out)
        (out / "diagnosis.md").write_text(found.markdown(draw_all(found, out)))
        return found


def prepare(
    model: str,
    suite: Sequence[str],
    split: str,
    n: int,
    layers: list[int],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    device: str = "auto",
    dtype: str = "auto",
) -> Plan:
    """Load everything; `device` and `dtype` as `opening.open_model` takes them.

    Raises:
        ValueError, OSError: a file, a name or a value does not fit; the message says which.
    """
    absent = [name for module, name in NEEDED.items() if not importlib.util.find_spec(module)]
    if absent:
        raise ValueError(f"A diagnosis needs {absent}; install with `pip install {' '.join(absent)}`.")
    options = {"layers": layers or None, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}
    if not model:
        if suite:
            raise ValueError(f"--suite {list(suite)} is for a model that is named; the testbed has prompts of its own.")
        if split not in SPLITS[1:]:
            raise ValueError(f"split={split!r} must be one of {SPLITS[1:]}.")
        return Plan(*load_testbed(seed), load_world(split, n), StrictJudge(REFUSAL), options)
    if not suite:
        raise ValueError(f"For the model {model!r} give --suite, harmful and benign data sets.")
    asked = load_suite(suite, n)
    if not all(_counts(asked)):
        raise ValueError(f"{_told(asked)}: both are needed; add a --suite that has the other.")
    opened = open_model(model, device, dtype)
    return Plan(opened.model, opened.processor, asked, WordJudge(), options)


def _counts(suite: Suite) -> tuple[int, int]:
    """Of malicious and of benign prompts, without reading any."""
    return len(suite.harmful) + sum(map(len, suite.attacks.values())), sum(map(len, suite.benign.values()))


def _told(suite: Suite) -> str:
    malicious, benign = _counts(suite)
    return f"{malicious} malicious and {benign} benign prompts of {suite.name}"


def draw_all(found: Diagnosis, out: Path) -> list[str]:
    """Draw every part that there is, as PNG and SVG; the names of the PNGs."""
    drawn = {
        "trace": lambda path: draw_trace(found.trace, path),
        "mediation": lambda path: draw_mediation(found.mediation, path),
        "separability": lambda path: draw_separability(found.separability, path),
        "neurons": lambda path: draw_neurons(found.neurons, path),
    }
    drawn = {name: paint for name, paint in drawn.items() if getattr(found, name)}
    for name, one in found.attributions.items():
        drawn[f"attribution_{name}"] = lambda path, one=one: draw(one, path)
    for name, paint in drawn.items():
        for suffix in SUFFIXES:
            paint(out / f"{name}{suffix}")
    return [f"{name}{SUFFIXES[0]}" for name in drawn]
