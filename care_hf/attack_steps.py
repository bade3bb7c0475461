"""How an attack moves: the step rules of MI-FGSM, PGD and APGD, and the climb that follows one; tensors only.

Every loss here is to be minimised, and every row of a batch is a search of its own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import cos, pi

import torch

OPTIMISERS = ("mi-fgsm", "pgd", "apgd")
MOMENTUM = 0.5  # of MI-FGSM, unless told
NEW_STEP = 0.75  # APGD's alpha: the share of the new step; the rest is the step before
SUCCESSFUL = 0.75  # APGD's rho: with fewer successful steps since the last checkpoint, the step size is halved

# Takes grey levels (B, ...) and whether a gradient is wanted; returns losses and penalties, float32 (2, B) on the CPU,
# and the gradient of the objective in the levels, or None.
Evaluate = Callable[[torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Search:
    """The budget and the way of an attack.

    Attributes:
        eps: radius of the L-infinity ball in grey levels of 255.
        steps: gradient steps of each restart.
        restarts: how many climbs; the best of all is kept.
        optimiser: one of `OPTIMISERS`.
        step_size: the first step in grey levels; None for `eps`, or twice that for APGD, as its authors do.
        momentum: of MI-FGSM, how much of the past gradients is kept at each step; None for `MOMENTUM`.
        keep_steps: numbers of steps after which the best so far is kept, too.

    Raises:
        ValueError: a setting out of range, or one that the optimiser does not have.
    """

    eps: float
    steps: int
    restarts: int
    optimiser: str = "mi-fgsm"
    step_size: float | None = None
    momentum: float | None = None
    keep_steps: Sequence[int] = ()

    def __post_init__(self):
        if not 0 <= self.eps <= 255:
            raise ValueError(f"eps={self.eps} must be in grey levels, from 0 to 255.")
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps={self.steps} and restarts={self.restarts} must be at least 1.")
        if self.optimiser not in OPTIMISERS:
            raise ValueError(f"optimiser={self.optimiser!r} is not known; choose one of {OPTIMISERS}.")
        if self.step_size is not None and not self.step_size >= 0:
            raise ValueError(f"step_size={self.step_size} must be in grey levels, 0 or more.")
        if self.momentum is not None and (self.optimiser != "mi-fgsm" or not self.momentum >= 0):
            raise ValueError(
                f"momentum={self.momentum} with optimiser={self.optimiser!r}: it is a setting of 'mi-fgsm' alone, 0 or "
                "more; leave it out for the others."
            )
        if not all(0 <= steps <= self.steps for steps in self.keep_steps):
            raise ValueError(f"keep_steps={tuple(self.keep_steps)} must lie between 0 and steps={self.steps}.")

    def rule(self, point: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> "SignSteps | AutoSteps":
        """The step rule, at `point` (B, ...) in the box from `low` to `high`."""
        if self.optimiser == "apgd":
            size = 2 * self.eps if self.step_size is None else self.step_size
            return AutoSteps(point, low, high, steps=self.steps, size=size)
        size = self.eps if self.step_size is None else self.step_size
        momentum = 0.0 if self.optimiser == "pgd" else MOMENTUM if self.momentum is None else self.momentum
        return SignSteps(point, low, high, steps=self.steps, size=size, momentum=momentum)


class SignSteps:
    """Sign steps in a box, with momentum and a size that falls as a cosine, from `size` at the first step towards 0.

    MI-FGSM (Dong et al. 2018, arXiv 1710.06081, equations 6 and 7, apart from the size, which is constant there); with
    momentum 0, PGD (Madry et al. 2018, arXiv 1706.06083).

    Attributes:
        point: (B, ...), where the searches are.
    """

    def __init__(self, point, low, high, *, steps: int, size: float, momentum: float):
        self.point, self._low, self._high = point.clamp(low, high), low, high
        self._steps, self._size, self._momentum = steps, size, momentum
        self._velocity, self._step = torch.zeros_like(point), 0

    def advance(self, objective: torch.Tensor, gradient: torch.Tensor) -> None:
        """Move `point`, where the objective is (B,) and has this gradient (B, ...)."""
        scale = gradient.abs().mean(tuple(range(1, gradient.ndim)), keepdim=True)
        scale = scale.clamp_min(torch.finfo(gradient.dtype).tiny)
        self._velocity = self._momentum * self._velocity + gradient / scale
        size = self._size * (1 + cos(pi * self._step / self._steps)) / 2
        self.point = (self.point - size * self._velocity.sign()).clamp(self._low, self._high)
        self._step += 1


class AutoSteps:
    """APGD for the L-infinity norm (Croce & Hein 2020, arXiv 2003.01690, algorithm 1), turned to minimise.

    At each checkpoint a search whose steps have mostly failed (condition 1), or whose size and best have stayed the
    same since the last one (condition 2), halves its step size and goes on from its best point. The algorithm takes one
    more step before it looks; here that step, which a restart would throw away, is not evaluated, nor is the best
    point a second time. A step after a restart succeeds if it is better than the best point, where it came from.

    Attributes:
        point: (B, ...), where the searches are.
        size: (B,), the present step size of each.
    """

    def __init__(self, point, low, high, *, steps: int, size: float):
        self.point, self._low, self._high = point.clamp(low, high), low, high
        self.size = torch.full((len(point),), float(size), dtype=point.dtype, device=point.device)
        self._checkpoints, self._step, self._checked = set(checkpoints(steps)), 0, 0
        self._before = self._best = self.point  # the point before, the best one
        self._best_gradient = torch.zeros_like(self.point)
        self._lowest = self._last = torch.full_like(self.size, torch.inf)
        self._successes = torch.zeros_like(self.size)
        self._lowest_checked, self._halved = self._lowest, torch.zeros_like(self.size, dtype=torch.bool)

    def advance(self, objective: torch.Tensor, gradient: torch.Tensor) -> None:
        """Move `point`, where the objective is (B,) and has this gradient (B, ...)."""
        self._successes += (objective < self._last) & (self._step > 0)
        better = objective < self._lowest
        self._best, self._best_gradient = (
            torch.where(_rows(better, self.point), new, old)
            for new, old in ((self.point, self._best), (gradient, self._best_gradient))
        )
        self._lowest, self._last = torch.where(better, objective, self._lowest), objective
        if self._step == 0:
            self._lowest_checked = self._lowest
        if self._step in self._checkpoints:
            gradient = self._check(gradient)
        self._move(gradient)

    def _check(self, gradient: torch.Tensor) -> torch.Tensor:
        """Halve and restart where a condition holds; the gradients at the points that remain."""
        failing = self._successes < SUCCESSFUL * (self._step - self._checked)
        stuck = ~self._halved & (self._lowest == self._lowest_checked)
        self._halved = failing | stuck
        self.size = torch.where(self._halved, self.size / 2, self.size)
        rows = _rows(self._halved, self.point)
        self.point = torch.where(rows, self._best, self.point)
        self._last = torch.where(self._halved, self._lowest, self._last)
        self._checked, self._lowest_checked = self._step, self._lowest
        self._successes = torch.zeros_like(self._successes)
        return torch.where(rows, self._best_gradient, gradient)

    def _move(self, gradient: torch.Tensor) -> None:
        ahead = (self.point - _rows(self.size, self.point) * gradient.sign()).clamp(self._low, self._high)
        if self._step:  # the first step has none before it
            ahead = self.point + NEW_STEP * (ahead - self.point) + (1 - NEW_STEP) * (self.point - self._before)
        self._before, self.point = self.point, ahead.clamp(self._low, self._high)
        self._step += 1


def checkpoints(steps: int) -> list[int]:
    """The steps at which APGD looks back: its ``ceil(p_j * steps)``, in order, each once.

    ``p_0 = 0, p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06)`` (arXiv 2003.01690, section 3.2), here in
    hundredths, since ``ceil`` would make a whole step of a rounding error.
    """
    found, before, hundredths = [], 0, 22
    while hundredths <= 100:
        found.append(-(-hundredths * steps // 100))
        before, hundredths = hundredths, hundredths + max(hundredths - before - 3, 6)
    return sorted(set(found))


@dataclass(frozen=True, eq=False)
class Climbed:
    """What a climb saw.

    Attributes:
        found: the best levels (B, ...) after each number of steps that was asked for, and after all.
        best: int64 (B,), which of the images up to there that was (restart * (steps + 1) + step), for the same numbers.
        losses: (restarts, steps + 1, B).
        penalties: (restarts, steps + 1, B).
    """

    found: dict[int, torch.Tensor]
    best: dict[int, torch.Tensor]
    losses: torch.Tensor
    penalties: torch.Tensor


def climb(
    search: Search,
    starts: Iterable[torch.Tensor],
    low: torch.Tensor,
    high: torch.Tensor,
    evaluate: Evaluate,
    weight: float = 0.0,
) -> Climbed:
    """Follow the step rule from every start, and keep the lowest ``loss + weight * penalty`` of each row.

    Only whole levels are evaluated, so that what is found can be saved; the steps add up between them.

    Args:
        search: the budget and the step rule.
        starts: of the restarts, (B, ...) each.
        low: the box, in whole levels, so that rounding never leaves it.
        high: its other end.
        evaluate: see `Evaluate`.
        weight: of the penalty.

    Raises:
        ValueError: an objective is not finite.
    """
    kept = {steps: _Best(steps) for steps in sorted({*search.keep_steps, search.steps})}
    curves = []
    for restart, start in enumerate(starts):
        rule = search.rule(start, low, high)
        for step in range(search.steps + 1):
            levels = rule.point.round()
            values, gradient = evaluate(levels, step < search.steps)
            objective = values[0] + weight * values[1]
            if not objective.isfinite().all():
                raise ValueError(
                    f"The loss after {step} steps of restart {restart} is not finite; run the model in a wider dtype."
                )
            for best in kept.values():
                best.see(levels, objective, restart, step)
            curves.append(values)
            if gradient is not None:
                rule.advance(objective.to(levels), gradient)
    losses, penalties = torch.stack(curves, 1).unflatten(1, (-1, search.steps + 1))
    found, index = ({steps: getattr(best, name) for steps, best in kept.items()} for name in ("levels", "index"))
    return Climbed(found, index, losses, penalties)


class _Best:
    """The best levels of each row in the first `steps` steps of every restart."""

    def __init__(self, steps: int):
        self.steps, self.levels, self.index, self._lowest = steps, None, None, None

    def see(self, levels: torch.Tensor, objective: torch.Tensor, restart: int, step: int) -> None:
        if step > self.steps:
            return
        if self.levels is None:
            self.levels, self._lowest = levels.detach().clone(), objective.clone()
            self.index = torch.zeros(len(levels), dtype=torch.int64)
            return
        better = objective < self._lowest
        self.levels[better], self._lowest[better] = levels.detach()[better], objective[better]
        self.index[better] = restart * (self.steps + 1) + step


def _rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) as (B, 1, ..., 1)."""
    return values.view(-1, *[1] * (like.ndim - 1))
