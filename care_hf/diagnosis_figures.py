"""Draw what a diagnosis found: a causal trace, separability, mediation and neurons; all of it reads in grey."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .attribution_figures import AGAINST, FOR, VISIBLE
from .figure_parts import (
    BAND,
    GREY,
    STYLES,
    by_component,
    draw_intervals,
    draw_line,
    infinity_signs,
    label_of,
    layer_panels,
    legend_below,
    new_figure,
    save_figure,
)
from .mediation import Mediation
from .neurons import NeuronRanking, VerifiedNeuron
from .pair_runs import GROUPS
from .rates import Mean, Rate
from .separability import Separability
from .separation import MEASURES
from .sites import Site
from .trace_results import Outcome, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHOSEN: dict[str, dict[str, Any]] = {
    "top": {"marker": "o", "color": "#000000"},
    "random": {"marker": "s", "color": "#8a8a8a", "markerfacecolor": "white"},
}
ANNOTATED = 40  # columns of a heat map, up to which its cells hold their numbers
Bars = Sequence[tuple[float, float, float]]  # value, and its interval's ends; NaN where there is none


def draw_trace(trace: Trace, path: str | Path, mode: str | None = None) -> None:
    """Draw a causal trace by layer and component: attacks, benign prompts beside them, and the log-odds of refusal.

    Args:
        trace: what `tracing.trace` returned.
        path: a file ending in ".png" or ".svg", in a folder that exists; the text of an SVG file is text.
        mode: of blocking; the first of the trace, if None.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file ends otherwise, or the trace has no such mode or no block.
    """
    save_figure(path, lambda: trace_figure(trace, mode))


def draw_separability(separability: Separability, path: str | Path) -> None:
    """Draw separability by layer and component, each measure in its panel beside what random labels give.

    Infinite values stand at the upper edge under an infinity sign.

    Args:
        separability: what `measure_separability` returned.
        path: as for `draw_trace`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file ends otherwise, or there is no site.
    """
    save_figure(path, lambda: separability_figure(separability))


def draw_mediation(mediation: Mediation, path: str | Path) -> None:
    """Draw the share of the total effect that goes through each place, by group of tokens, as heat maps.

    Darker is more, hue and number tell the sign. All panels share one scale, which ends at the largest share but at
    100 % at most. Up to 40 layers, cells hold their percent; with more, a minus marks those clearly below zero. Hatched
    cells were measured in no pair.

    Args:
        mediation: what `mediate` returned.
        path: as for `draw_trace`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file ends otherwise, or there is no site.
    """
    save_figure(path, lambda: mediation_figure(mediation))


def draw_neurons(ranking: NeuronRanking, path: str | Path) -> None:
    """Draw the measured effects of units against their estimates; on the dashed line both are equal.

    Args:
        ranking: what `rank_neurons` returned.
        path: as for `draw_trace`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file ends otherwise.
    """
    save_figure(path, lambda: neurons_figure(ranking))


def trace_figure(trace: Trace, mode: str | None = None) -> "Figure":
    """The figure of `draw_trace`."""
    mode = next(iter(trace.blocked), None) if mode is None else mode
    if mode not in trace.blocked:
        raise ValueError(f"mode={mode!r} is not in the trace; choose one of {tuple(trace.blocked)}.")
    blocked, base = trace.blocked[mode], trace.unblocked
    panels: dict[str, Callable[[Outcome], tuple[float, float, float]]] = {
        "attacks\ncomplied, %": lambda one: _percent(trace.rate(one, "malicious", "complied")),
        "attacks\nrefused, %": lambda one: _percent(trace.rate(one, "malicious", "refused")),
        "benign\nright, %": lambda one: _percent(trace.rate(one, "benign", "complied")),
        "log-odds of refusal,\nchange, nats": lambda one: _ends(trace.log_odds_change(one)),
    }
    figure, rows = layer_panels(list(panels), blocked)
    for axes, value in zip(rows, panels.values(), strict=True):
        whole, low, high = value(base)
        if low < high:
            axes.axhspan(low, high, color=BAND, zorder=0, label="_unblocked interval")
        axes.axhline(whole, color=GREY, linewidth=1, zorder=1, label="unblocked")
        for x, component, sites in by_component(blocked):
            _bars(axes, x, [value(blocked[site]) for site in sites], component, label_of(component))
    for axes in rows[:3]:
        axes.set(ylim=(-4, 104), yticks=range(0, 101, 25))
    figure.suptitle(
        f"Blocked by {mode!r}: {len(base.malicious)} malicious and {len(base.benign)} benign prompts\n"
        "bars and band: 95 % intervals",
        fontsize=9,
    )
    legend_below(figure, rows[0])
    return figure


def separability_figure(separability: Separability) -> "Figure":
    """The figure of `draw_separability`."""
    found = separability.sites
    names = {"scatter_ratio": "scatter ratio", "mahalanobis": "Mahalanobis", "auc": "AUC of a probe"}
    figure, rows = layer_panels([names.get(name, name) for name in MEASURES], found)
    for axes, measure in zip(rows, MEASURES, strict=True):
        for x, component, sites in by_component(found):
            style = {**STYLES[component], "marker": "_", "color": GREY, "linewidth": 0.9}
            draw_line(axes, x, [found[site].control[measure][1] for site in sites], f"control {component}", style)
            draw_line(axes, x, [getattr(found[site], measure) for site in sites], component, STYLES[component])
        if measure in ("scatter_ratio", "mahalanobis"):
            axes.set_ylim(bottom=0)
        infinity_signs(axes, {site.layer for site, one in found.items() if getattr(one, measure) == math.inf})
    axes.axhline(0.5, color=BAND, linewidth=1, zorder=0, label="_chance")  # of AUC, the last one
    prompts = separability.settings.get("prompts", {})
    counts = ": " + " and ".join(f"{n} {name}" for name, n in prompts.items()) + " prompts" if prompts else ""
    figure.suptitle(f"Benign against malicious activations{counts}", fontsize=9)
    rows[0].plot([], [], color=GREY, linewidth=0.9, label="95 % quantile of random labels")
    legend_below(figure, rows[0])
    return figure


def mediation_figure(mediation: Mediation) -> "Figure":
    """The figure of `draw_mediation`."""
    components = [(component, sites) for _, component, sites in by_component(mediation.effects)]
    layers = sorted({site.layer for site in mediation.effects})
    grids = {component: _shares(mediation, component, layers) for component, _ in components}
    peak = max((abs(v) for grid in grids.values() for v in grid.flat if math.isfinite(v)), default=0.0)
    limit = min(peak, 1.0) or 1.0
    annotated = len(layers) <= ANNOTATED
    # Wide enough for "-100" in a cell, and for the title.
    width = max(len(layers) * (0.31 if annotated else 0.13), 3.6) + 2.4
    figure = new_figure((width, 1.35 * len(grids) + 1.0))
    rows = figure.subplots(len(grids), sharex=True, squeeze=False)[:, 0]
    hatched = 0
    for axes, (component, grid) in zip(rows, grids.items(), strict=True):
        mesh = _heat(axes, grid, limit, annotated)
        empty = np.argwhere(_empty(mediation, component, layers)).tolist()
        hatched += len(empty)
        for row, column in empty:
            _hatched(axes, row, column)
        axes.set_title(label_of(component), fontsize=9, loc="left")
        axes.set(ylim=(len(GROUPS) - 0.5, -0.5), yticks=range(len(GROUPS)))
        axes.set_yticklabels(GROUPS, fontsize=8)
    step = 1 if annotated else math.ceil(len(layers) / ANNOTATED) + 1
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    axes.set_xlabel("layer", fontsize=9)
    bar = figure.colorbar(mesh, ax=rows, extend="both" if peak > limit else "neither", aspect=12 * len(grids), pad=0.02)
    bar.set_label("indirect effect, % of the total", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(_total(mediation) + "\nhatched: measured in no pair" * bool(hatched), fontsize=9)
    return figure


def neurons_figure(ranking: NeuronRanking) -> "Figure":
    """The figure of `draw_neurons`."""
    figure = new_figure((6.0, 4.6))
    axes = figure.subplots()
    axes.axhline(0, color=BAND, linewidth=1, zorder=0, label="_zero")
    for chosen in CHOSEN:
        units = [unit for unit in ranking.verified if unit.chosen == chosen]
        if units:
            label = f"{chosen} {len(units)}: {_correlation(ranking, chosen)}"
            _units(axes, units, {**CHOSEN[chosen], "label": label, "zorder": 3 + (chosen == "top")})
    axes.axline((0, 0), slope=1, color=GREY, linestyle="--", linewidth=1, zorder=1, label="estimate = effect")
    axes.set_xlabel("estimate to first order, nats", fontsize=9)
    axes.set_ylabel("measured effect on the log-odds of refusal, nats", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"FFN units, ablated one by one; log-odds of refusal without ablation {ranking.outcome:+.2f} nats\n"
        "bars: 95 % intervals",
        fontsize=9,
    )
    legend_below(figure, axes, f"rank correlation of estimate and effect, all: {_correlation(ranking, 'both')}")
    return figure


# Parts of the figures


def _percent(rate: Rate) -> tuple[float, float, float]:
    return (100 * rate.value, *(100 * end for end in rate.interval)) if rate.n else (math.nan,) * 3


def _ends(mean: Mean) -> tuple[float, float, float]:
    return mean.value, mean.low, mean.high


def _bars(axes: "Axes", x: np.ndarray, bars: Bars, component: str, label: str) -> None:
    values, low, high = np.array(bars).T
    style = STYLES[component]
    axes.plot(x, values, label=label, zorder=3, **style)
    draw_intervals(axes, x, low, high, style["color"], label)


def _shares(mediation: Mediation, component: str, layers: Sequence[int]) -> np.ndarray:
    """Shares of groups (rows) and layers (columns); NaN where there is none."""
    sites = [Site(layer, component) for layer in layers]
    known = mediation.effects
    return np.array(
        [
            [mediation.share(site, group) if site in known and group in known[site] else math.nan for site in sites]
            for group in GROUPS
        ]
    )


def _total(mediation: Mediation) -> str:
    total, n = mediation.total, len(mediation.refused)
    interval = f" [{total.low:.2f}, {total.high:.2f}]" if n > 1 else ""
    return f"Total effect of being refused {total.value:.2f}{interval} nats, {n} pair{'s' * (n != 1)}"


def _empty(mediation: Mediation, component: str, layers: Sequence[int]) -> np.ndarray:
    """Where no pair has been measured, bool (groups, layers)."""

    def empty(layer: int, group: str) -> bool:
        found = mediation.effects.get(Site(layer, component), {}).get(group)
        return found is None or all(value is None for value in found.indirect)

    return np.array([[empty(layer, group) for layer in layers] for group in GROUPS])


def _heat(axes: "Axes", grid: np.ndarray, limit: float, annotated: bool):
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("care", [AGAINST / 255, (1.0, 1.0, 1.0), FOR / 255])
    shown = {"cmap": scale, "vmin": -100 * limit, "vmax": 100 * limit, "edgecolors": "0.8", "linewidth": 0.3}
    rows, columns = (np.arange(size + 1) - 0.5 for size in grid.shape)
    mesh = axes.pcolormesh(columns, rows, np.ma.masked_invalid(100 * grid), **shown)
    for (row, column), share in np.ndenumerate(grid):
        if math.isfinite(share) and (annotated or share <= -VISIBLE * limit):
            # 0.0: no "-0".
            text = f"{round(100 * share) + 0.0:.0f}" if annotated else "\u2212"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, weight="normal" if annotated else "bold")
    return mesh


def _hatched(axes: "Axes", row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    box = (column - 0.5, row - 0.5), 1, 1
    axes.add_patch(Rectangle(*box, facecolor="white", edgecolor="0.6", linewidth=0.3, hatch="////"))


def _units(axes: "Axes", units: Sequence[VerifiedNeuron], style: dict[str, Any]) -> None:
    x = np.array([unit.estimate for unit in units])
    axes.plot(x, [unit.effect for unit in units], linestyle="none", markersize=5, **style)
    ends = np.array([(unit.low, unit.high) for unit in units], dtype=float)  # None: NaN
    draw_intervals(axes, x, *ends.T, style["color"], units[0].chosen)


def _correlation(ranking: NeuronRanking, which: str) -> str:
    value = ranking.correlation.get(which)
    return "undefined" if value is None else f"{value:.3f}"
