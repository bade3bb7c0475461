"""The values that a search gives to the fields of a recipe, by family of recipes."""

from dataclasses import dataclass
from typing import Any

from .projection import FUSIONS
from .recipe import CENTRINGS, PROJECTORS

TURN_FAMILY, MODALITY_FAMILY = "turn", "modality"
FAMILIES = (TURN_FAMILY, MODALITY_FAMILY)


@dataclass(frozen=True)
class Choice:
    """One of some plain values."""

    values: tuple[Any, ...]

    def suggest(self, trial, name: str) -> Any:
        """Let an optuna trial choose."""
        return trial.suggest_categorical(name, list(self.values))

    def holds(self, value: Any) -> bool:
        """Whether a value can be chosen."""
        return value in self.values


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, on a logarithmic scale or not, whole or not."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def suggest(self, trial, name: str) -> Any:
        """Let an optuna trial choose."""
        suggest = trial.suggest_int if self.whole else trial.suggest_float
        return suggest(name, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether a value can be chosen."""
        return isinstance(value, (int, float)) and self.low <= value <= self.high


SHRINKAGES = Choice(("ledoit-wolf", 0.001, 0.01, 0.1, 0.5))
SITES = {"component": Choice(("residual", "ffn")), "first": Range(0.0, 1.0), "count": Range(1, 3, whole=True)}
# By field of a recipe; "+" joins a scope's parts. "first" and "count" say which of the space's layers are repaired.
TURN = {
    "scope": Choice(("last+response", "last")),
    **SITES,
    "rank": Range(1, 32, log=True, whole=True),
    "basis": Choice(("pattern", "filter")),
    "anchor": Choice(("refused", "benign", "none")),
    "beta": Range(0.0, 1.5),
    "strength": Range(0.5, 1.5),
    "gate_ridge": Range(1e-4, 0.3, log=True),
    "false_alarms": Range(1e-4, 0.02, log=True),
    "projector": Choice(PROJECTORS),
    "centring": Choice(CENTRINGS),
    "shrinkage": SHRINKAGES,
}
MODALITY = {
    "scope": Choice(("all", "prompt")),
    **SITES,
    "rank": Range(1, 64, log=True, whole=True),
    "beta": Range(0.0, 1.5),
    "strength": Range(0.5, 1.5),
    "projector": Choice(PROJECTORS),
    "centring": Choice(CENTRINGS),
    "shrinkage": SHRINKAGES,
    "fusion": Choice(FUSIONS),
    "fusion_weight": Range(0.0, 1.0),
}
DIMENSIONS = {TURN_FAMILY: TURN, MODALITY_FAMILY: MODALITY}
