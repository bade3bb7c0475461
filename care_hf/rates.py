"""Shares with their intervals."""

from dataclasses import dataclass

from scipy.stats import binomtest


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

    def __add__(self, other: "Rate") -> "Rate":
        return Rate(self.count + other.count, self.n + other.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]"
