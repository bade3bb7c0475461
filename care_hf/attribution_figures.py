"""Draw which tokens an answer hangs on: heat over images, coloured text, a scale; all of it reads in grey."""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from textwrap import fill

import numpy as np

# About as light as one another, and so that black text is legible on them.
FOR, AGAINST = np.array([230, 126, 34]), np.array([98, 140, 200])
ROUNDING = 1e-6  # nats; scores below it differ by rounding alone
VISIBLE = 0.05  # of full strength; what is weaker gets no mark of its sign, for it would be seen as strong
COLUMNS = 48  # characters in a line of the figure's text
FORMATS = (".png", ".svg")
CHARACTER, LINE = 0.0835, 0.2  # inches, of the font at 10 points
TITLE_WIDTH = 0.08  # inches of a character of the title, at most on average


def colour(strength: float) -> np.ndarray:
    """RGB in [0, 255] of a strength in [-1, 1]: lightness tells the size, hue the sign, 0 is white."""
    full = FOR if strength >= 0 else AGAINST
    return np.rint(255 + min(abs(strength), 1) * (full - 255.0)).astype(int)


def draw(attribution, path: str | Path) -> None:
    """Draw a `TokenAttribution`: every image under the heat of its tokens, the tokens as text, and the scale.

    The heat is in blocks, one a token. Darker is stronger; what speaks against the answer is hatched. Ablation scores
    of each image and of the text are shaded up to the strongest of their own, which is written below: one strong word
    would leave the images white. An image whose layout of tokens is not known is shown without heat.

    Args:
        attribution: what `attribute` returned.
        path: a file ending in ".png" or ".svg"; the text of an SVG file is text.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file ends otherwise.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"path={str(path)!r} must end in one of {FORMATS}.")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib; install it with `pip install matplotlib`.") from error
    lines = _lines(attribution)
    images, side, margin = len(attribution.images), 2.6, 0.3
    text_width, text_height = COLUMNS * CHARACTER, LINE * max(len(lines), 1)
    width = margin + images * (side + margin) + text_width + margin
    height = max(text_height + 1.3, side + 0.9 if images else 0)
    figure = Figure(figsize=(width, height))

    def axes(left, top, across, down):
        return figure.add_axes((left / width, 1 - (top + down) / height, across / width, down / height))

    for index in range(images):
        _draw_image(axes(margin + index * (side + margin), 0.5, side, side), attribution, index)
    left = margin + images * (side + margin)
    _draw_text(axes(left, 0.5, text_width, text_height), lines)
    _draw_scale(axes(left, 0.5 + text_height + 0.25, 2.4, 0.14), attribution)
    title = fill(_title(attribution), int((width - 2 * margin) / TITLE_WIDTH))
    figure.text(margin / width, 1 - 0.25 / height, title, fontsize=9, va="center", parse_math=False)
    with rc_context({"svg.fonttype": "none", "hatch.linewidth": 0.6}):
        figure.savefig(path, dpi=150)


def tokens_html(attribution) -> str:
    """See `TokenAttribution.html`."""
    (strengths, _), spans, index = _strengths(attribution), [], 0
    for visual, run in groupby(attribution.visual.tolist()):
        indices = range(index, index := index + len(list(run)))
        if visual:
            strongest = max(indices, key=lambda i: abs(strengths[i]))
            noun = "token" if len(indices) == 1 else "tokens"
            text = f" [{len(indices)} image {noun}, strongest {_score(attribution, strongest)}] "
            spans.append(_span(text, strengths[strongest], _score(attribution, strongest)))
        else:
            spans += [_span(_visible(attribution.tokens[i]), strengths[i], _score(attribution, i)) for i in indices]
    signed = attribution.method == "ablation"
    key = "darker: stronger" + "; underlined: against the answer" * signed
    about = f"{escape(_visible(_title(attribution)))}. {key[0].upper()}{key[1:]}."
    return f'<div><span style="font-size:85%">{about}</span><br>{"".join(spans)}</div>'


def _span(text: str, strength: float, score: str) -> str:
    red, green, blue = colour(strength)
    line = ";text-decoration:underline" if strength <= -VISIBLE else ""
    style = f"background-color:#{red:02x}{green:02x}{blue:02x};color:#000;white-space:pre-wrap{line}"
    return f'<span style="{style}" title="{score}">{escape(text)}</span>'


def _strengths(attribution, indices=slice(None)) -> tuple[list[float], float]:
    """Strengths in [-1, 1], 0 for no effect, and the score of strength 1: the strongest of `indices`."""
    scores = attribution.scores[indices]
    if attribution.method == "kernel":
        return scores.tolist(), 1.0
    peak = max(scores.abs().tolist(), default=0.0)
    return (scores / peak if peak > ROUNDING else 0 * scores).tolist(), peak


def _score(attribution, index: int) -> str:
    score = attribution.scores[index].item()
    return f"{score:+.3f} nats" if attribution.method == "ablation" else f"{score:.3f}"


def _title(attribution) -> str:
    if attribution.method == "kernel":
        return f"Coupling (kernel score) at {attribution.site}"
    answer = attribution.answer if len(attribution.answer) <= 60 else attribution.answer[:57] + "..."
    return f"Effect on log p({answer!r}) = {attribution.log_probability:.2f} nats, ablated at {attribution.site}"


def _visible(token: str) -> str:
    # A line break would end the HTML block in Markdown, and be invisible as a token.
    return "".join("\u21b5" if c in "\r\n" else " " if c == "\t" else c for c in token)


def _lines(attribution) -> list[list[tuple[int, str, float]]]:
    """The text tokens as lines of (column, text, strength), broken between tokens or within long ones."""
    lines, column = [[]], 0
    words = (~attribution.visual).nonzero()[:, 0]
    for index, strength in zip(words.tolist(), _strengths(attribution, words)[0], strict=True):
        text = _visible(attribution.tokens[index])
        if column and column + len(text) > COLUMNS:
            lines.append([])
            column = 0
        for begin in range(0, len(text), COLUMNS):
            part = text[begin : begin + COLUMNS]
            if begin:
                lines.append([])
                column = 0
            lines[-1].append((column, part, strength))
            column += len(part)
    return lines


def _block(axes, x: float, y: float, width: float, height: float, strength: float, opacity: float = 1) -> None:
    from matplotlib.patches import Rectangle

    against = strength <= -VISIBLE
    axes.add_patch(
        Rectangle(
            (x, y),
            width,
            height,
            facecolor=(*colour(strength) / 255, opacity),
            edgecolor=(0, 0, 0, 0.2 + 0.5 * min(1, abs(strength))),  # of the hatching alone, since lines have no width
            linewidth=0,
            hatch="////" if against else None,
        )
    )


def _draw_image(axes, attribution, index: int) -> None:
    found = attribution.images[index]
    strengths, peak = _strengths(attribution, found.indices)
    rows, columns = found.grid or (1, 1)
    size = (columns, rows) if found.image is None else found.image.size
    if found.image is not None:
        grey = np.asarray(found.image.convert("L"), dtype=float)
        # Pale under heat, so that darkness is the heat's.
        grey = 255 - (255 - grey) * (0.2 if found.grid else 1)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(0, size[0], size[1], 0), interpolation="nearest")
    across, down = size[0] / columns, size[1] / rows
    for place, strength in enumerate(strengths if found.grid else ()):
        row, column = divmod(place, columns)
        opacity = 1 if found.image is None else 0.8 * abs(strength)
        _block(axes, column * across, row * down, across, down, strength, opacity)
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0), xticks=[], yticks=[], aspect="equal", anchor="N")
    size = f"{rows} x {columns} tokens{_full(attribution, peak)}" if found.grid else "layout of tokens not known"
    axes.set_xlabel(f"image {index}: {size}", fontsize=8)


def _draw_text(axes, lines: Sequence[Sequence[tuple[int, str, float]]]) -> None:
    axes.set(xlim=(0, COLUMNS), ylim=(max(len(lines), 1), 0))
    axes.set_axis_off()
    font = {"family": "monospace", "fontsize": 10, "va": "center", "parse_math": False}
    for row, line in enumerate(lines):
        for column, text, strength in line:
            _block(axes, column, row + 0.05, len(text), 0.9, strength)
            axes.text(column, row + 0.5, text, **font)


def _full(attribution, peak: float) -> str:
    return f"; full shade: {peak:.2g} nats" if attribution.method == "ablation" else ""


def _draw_scale(axes, attribution) -> None:
    signed = attribution.method == "ablation"
    low, blocks = (-1 if signed else 0), 24
    for edge in np.arange(blocks) / blocks:
        left = low + edge * (1 - low)
        _block(axes, left, 0, (1 - low) / blocks, 1, left + (1 - low) / blocks / 2)
    axes.set(xlim=(low, 1), ylim=(0, 1), yticks=[], xticks=[-1, 0, 1] if signed else [0, 1])
    if signed:
        axes.set_xticklabels(["against", "0", "for the answer"], fontsize=8)
    peak = _strengths(attribution, ~attribution.visual)[1]
    axes.set_xlabel(f"text{_full(attribution, peak)}" if signed else "kernel score", fontsize=8)
