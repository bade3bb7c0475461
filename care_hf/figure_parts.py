"""What the figures of a diagnosis share: how components look, panels by layer, files; matplotlib is imported late."""

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .attribution_figures import FORMATS
from .sites import Site
from .trace_results import LAYER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by line, marker, filling and lightness.
WIDTHS = {"markersize": 4.5, "linewidth": 1.4}
STYLES: dict[str, dict[str, Any]] = {
    "residual": {"linestyle": "-", "marker": "o", "color": "#000000", **WIDTHS},
    "ffn": {"linestyle": "--", "marker": "s", "color": "#b8500f", "markerfacecolor": "white", **WIDTHS},
    "attention": {"linestyle": ":", "marker": "^", "color": "#5b93c8", **WIDTHS},
}
DODGE = 0.14  # layers, by which components stand beside one another
GREY, BAND = "0.55", "0.9"


def new_figure(size: tuple[float, float]) -> "Figure":
    """An empty figure of that many inches, which needs no display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib; install it with `pip install matplotlib`.") from error
    return Figure(figsize=size, layout="constrained")


def save_figure(path: str | Path, make: Callable[[], "Figure"]) -> None:
    """Write what `make` draws, if the file ends in one of `FORMATS`; equal figures are equal files.

    Raises:
        ValueError: the file ends otherwise.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"path={str(path)!r} must end in one of {FORMATS}.")
    figure = make()
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "care_hf", "hatch.linewidth": 0.6}):
        # A date would differ, and so would ids without a salt.
        figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)


def label_of(component: str) -> str:
    """What a component is called where layers are blocked or patched whole."""
    return LAYER if component == "residual" else component


def by_component(sites: Collection[Site]) -> list[tuple[np.ndarray, str, list[Site]]]:
    """Of each component the places along x, its name, and its sites by layer.

    Raises:
        ValueError: there is no site.
    """
    by = {name: sorted(site for site in sites if site.component == name) for name in STYLES}
    by = {name: own for name, own in by.items() if own}
    if not by:
        raise ValueError("There is no site to draw; give a result of at least one layer and component.")
    shifts = DODGE * (np.arange(len(by)) - (len(by) - 1) / 2)
    return [
        (np.array([site.layer for site in own]) + shift, name, own)
        for shift, (name, own) in zip(shifts, by.items(), strict=True)
    ]


def layer_panels(labels: Sequence[str], sites: Collection[Site]) -> tuple["Figure", np.ndarray]:
    """A figure of one panel per label, one above the other, that share the axis of layers."""
    by_component(sites)  # of which there must be some
    layers = {site.layer for site in sites}
    first, last = min(layers), max(layers)
    figure = new_figure((min(max(6.0, 2.0 + 0.3 * (last - first)), 16.0), 1.0 + 1.6 * len(labels)))
    rows = figure.subplots(len(labels), sharex=True)
    for axes, label in zip(rows, labels, strict=True):
        axes.set_ylabel(label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    step = math.ceil((last - first + 1) / 33)
    axes.set(xlim=(first - 0.5, last + 0.5), xticks=range(first, last + 1, step))
    axes.set_xlabel("layer", fontsize=9)
    figure.align_ylabels(rows)
    return figure, rows


def legend_below(figure: "Figure", axes: "Axes", title: str | None = None) -> None:
    """Name below all panels what one of them shows."""
    handles, labels = axes.get_legend_handles_labels()
    style = {"ncols": min(len(labels), 4), "fontsize": 8, "title_fontsize": 8, "frameon": False, "handlelength": 3.2}
    figure.legend(handles, labels, loc="outside lower center", title=title, **style)


def draw_intervals(axes: "Axes", x: np.ndarray, low: np.ndarray, high: np.ndarray, color: str, label: str) -> None:
    """Draw intervals by their ends, for a percentile interval need not hold the value; none where an end is NaN."""
    known = np.isfinite(low) & np.isfinite(high)
    if known.any():
        axes.vlines(x[known], low[known], high[known], color=color, linewidth=0.9, zorder=2, label=f"_{label} interval")


def draw_line(axes: "Axes", x: np.ndarray, values: Sequence[float], name: str, style: dict[str, Any]) -> None:
    """A line with gaps where values are not finite, and infinite ones at the upper edge; a "control" lies below."""
    y = np.array(values, dtype=float)
    control = name.startswith("control")
    label, zorder = (f"_{name}", 1) if control else (name, 3)
    axes.plot(x, np.where(np.isfinite(y), y, np.nan), label=label, zorder=zorder, **style)
    above = np.isposinf(y)
    if not above.any():
        return
    edge = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": zorder + 2}
    axes.plot(x[above], np.ones(above.sum()), label=f"_infinite {name}", **edge, **{**style, "linestyle": "none"})


def infinity_signs(axes: "Axes", layers: Collection[int]) -> None:
    """Write above the upper edge at which layers a value is infinite."""
    at = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "ha": "center"}
    for layer in sorted(layers):
        axes.annotate("\u221e", (layer, 1), (0, 3), fontsize=9, annotation_clip=False, **at)
