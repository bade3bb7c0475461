"""How much an evaluation measures."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from .settings_files import check_types


@dataclass(frozen=True)
class Budget:
    """How much is measured; the same for every defence.

    Attributes:
        cases: at most so many of every set.
        max_new_tokens: of every answer.
        batch_size: prompts per forward; memory only.
        gradient_cases: at most so many of every pictured family; 0 leaves gradient attacks out.
        universal_cases: prompts of every pictured family, beyond those, that a universal perturbation is made on; 0
            leaves such attacks out.
        eps: radii of gradient attacks in grey levels of 255; universal and toxic ones only at the first and the last.
        steps, restarts: of every gradient attack.
        optimisers: of gradient attacks, see `attacks.pgd`; all but the first at the first eps alone.
        weights: of the repair's own penalty in an adaptive attack's loss; all at the first eps, the last one alone at
            others. 0 is among them.
        curve_steps: after how many steps, at the first eps and by the first optimiser, success is measured as well.
    """

    cases: int = 160
    max_new_tokens: int = 64
    batch_size: int = 32
    gradient_cases: int = 16
    universal_cases: int = 4
    eps: tuple[int, ...] = (16, 32, 64, 255)
    steps: int = 40
    restarts: int = 2
    optimisers: tuple[str, ...] = ("mi-fgsm", "apgd")
    weights: tuple[float, ...] = (0.0, 1.0, 10.0)
    curve_steps: tuple[int, ...] = (5, 10, 20)

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                object.__setattr__(self, item.name, tuple(value))
        check_types(self)
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int) and value < (item.name not in ("gradient_cases", "universal_cases")):
                raise ValueError(f"{item.name}={value} must be positive.")
        if 0 not in self.weights or not self.optimisers:
            raise ValueError(
                f"weights={self.weights} must hold 0, an attack without the repair's penalty, and "
                f"optimisers={self.optimisers} at least one."
            )

    def quick(self) -> "Budget":
        """A small share of it, to see that everything runs."""
        most = {"cases": 24, "gradient_cases": 4, "steps": 10, "universal_cases": 1, "restarts": 1}
        small: dict[str, Any] = {name: min(count, getattr(self, name)) for name, count in most.items()}
        weights = tuple(dict.fromkeys((0.0, *self.weights)))[:2]
        small |= {"eps": self.eps[:1], "optimisers": self.optimisers[:1], "weights": weights, "curve_steps": (5,)}
        return Budget(**{**asdict(self), **small})
