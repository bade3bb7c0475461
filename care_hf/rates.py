"""Shares and means with their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap

RESAMPLES = 2000


@dataclass(frozen=True)
class Rate:
    """`count` out of `n`, with its 95 % Wilson interval."""

    count: int
    n: int

    @property
    def value(self) -> float:
        """The share."""
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % Wilson interval; it takes prompts as independent."""
        ends = binomtest(self.count, self.n).proportion_ci(0.95, method="wilson")
        return float(ends.low), float(ends.high)

    @property
    def percent(self) -> str:
        """For tables, "54 (50-57)", the interval rounded outwards; empty where there is nothing to count."""
        if not self.n:
            return ""
        low, high = self.interval
        # 1e-9: an end that is a whole number but for rounding stays so.
        return f"{100 * self.value:.0f} ({math.floor(100 * low + 1e-9)}-{math.ceil(100 * high - 1e-9)})"

    def __add__(self, other: "Rate") -> "Rate":
        return Rate(self.count + other.count, self.n + other.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Mean:
    """The mean of n values, and its 95 % percentile bootstrap interval, which takes values as independent.

    `low` and `high` are NaN where there are fewer than two values.
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], seed: int = 0) -> "Mean":
        """Of values; no value is NaN."""
        data = np.asarray(values, dtype=np.float64)
        mean = float(data.mean()) if len(data) else math.nan
        if len(data) < 2:
            return cls(mean, math.nan, math.nan, len(data))
        if np.ptp(data) == 0:  # of which every resample is the same
            return cls(mean, mean, mean, len(data))
        found = bootstrap((data,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed))
        return cls(mean, float(found.confidence_interval.low), float(found.confidence_interval.high), len(data))

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"
