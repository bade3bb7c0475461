"""The Pareto front of a tuning as a figure, legible in grey; matplotlib is imported late."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .figure_parts import new_figure, save_figure
from .tuning_choice import COMPLETE, DOMINATED, Rule, Trial
from .tuning_measures import Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by marker and filling.
STYLES = {
    "by turn, gated": {"marker": "o", "color": "#000000"},
    "by modality": {"marker": "^", "color": "#b8500f"},
}
LINEAR_BELOW = 1e-3  # nats a token: many divergences are 0, which a logarithmic scale cannot show


def draw_front(
    trials: Sequence[Trial], front: Sequence[Trial], chosen: Trial, rule: Rule, undefended: Measured, path: str | Path
) -> None:
    """Write a figure of all trials that have a repair, attack success against divergence.

    Args:
        trials: all; those that were pruned as they stood after the first part of the prompts.
        front: the Pareto front, with intervals and a line.
        chosen: is ringed.
        rule: whose limit of the divergence is drawn.
        undefended: is drawn at divergence 0.
        path: ends in .png, .svg or .pdf.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file ends otherwise.
    """
    save_figure(path, lambda: _draw(trials, front, chosen, rule, undefended))


def _draw(trials, front, chosen, rule, undefended) -> "Figure":
    figure = new_figure((6.4, 4.2))
    axes = figure.subplots()
    complete = [trial for trial in trials if trial.state == COMPLETE]
    pruned = [trial.measured.objectives[::-1] for trial in trials if trial.state == DOMINATED]
    axes.set_xscale("symlog", linthresh=LINEAR_BELOW)
    if pruned:
        axes.scatter(*zip(*pruned, strict=True), s=9, color="0.7", marker="s", label="pruned", zorder=2)
    for name, by_turn in zip(STYLES, (True, False), strict=True):
        own = [trial for trial in complete if trial.recipe.by_turn == by_turn]
        for on_front, filling in ((True, STYLES[name]["color"]), (False, "white")):
            shown = [trial for trial in own if (trial in front) == on_front]
            points = np.array([trial.measured.objectives for trial in shown]).reshape(-1, 2)
            label = name if not on_front else f"_{name}, front"
            axes.scatter(
                points[:, 1],
                points[:, 0],
                s=22,
                facecolors=filling,
                edgecolors=STYLES[name]["color"],
                marker=STYLES[name]["marker"],
                linewidths=0.9,
                zorder=4 if on_front else 3,
                label=label,
            )
    _draw_intervals(axes, front)
    x, y = chosen.measured.objectives[::-1]
    ring = {"s": 130, "facecolors": "none", "edgecolors": "black", "linewidths": 1.4}
    axes.scatter([x], [y], label="chosen", zorder=5, **ring)
    axes.scatter([0], [undefended.objectives[0]], marker="x", color="black", s=40, label="undefended", zorder=5)
    if rule.divergence is not None:
        axes.axvline(rule.divergence, color="0.55", linestyle=":", linewidth=1.2, label="limit", zorder=1)
    axes.set_xlim(left=-LINEAR_BELOW / 4)
    axes.set_ylim(bottom=-0.02)
    axes.set_xlabel("divergence from the base on benign prompts, nats a token", fontsize=9)
    axes.set_ylabel("attack success", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{len(complete)} complete of {len(trials)} trials; filled: Pareto front, 95 % intervals", fontsize=9
    )
    axes.legend(fontsize=8, frameon=False)
    return figure


def _draw_intervals(axes: "Axes", front: Sequence[Trial]) -> None:
    """The front as steps, between whose corners nothing was found, and both intervals of each point."""
    points = np.array([trial.measured.objectives for trial in front])
    axes.step(points[::-1, 1], points[::-1, 0], where="post", color="0.55", linewidth=1.0, zorder=2)
    for trial, (success, divergence) in zip(front, points, strict=True):
        low, high = trial.measured.success.interval
        axes.vlines(divergence, low, high, color="0.55", linewidth=0.8, zorder=2)
        mean = trial.measured.divergence
        axes.hlines(success, mean.low, mean.high, color="0.55", linewidth=0.8, zorder=2)
