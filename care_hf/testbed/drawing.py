"""Images of the testbed's world: 48 x 48 pixels, a grid of 6 x 6 tiles, one tile per vision patch.

Everything is drawn from a `numpy.random.Generator`, so that a seed gives the same pixels on any machine. Glyphs come
from a bundled sheet (``data/glyphs.png``, one row per font), so that no font has to be installed.
"""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

TILE = 8
GRID = 6
SIZE = TILE * GRID
ICON_CELLS = 6  # an icon is ICON_CELLS x ICON_CELLS cells of CELL pixels, mirrored left to right
CELL = 4
ICON_TILES = ICON_CELLS * CELL // TILE

TRAINING_FONTS = range(17)
HELD_OUT_FONTS = range(17, 21)
GLYPHS = "abcdefghijklmnopqrstuvwxyz0123456789"
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = {
    "red": (205, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 70, 205),
    "yellow": (215, 190, 30),
    "purple": (140, 50, 170),
    "orange": (235, 130, 30),
}
BLACK = (15, 15, 15)
INKS = ((40, 40, 60), (90, 30, 30), (30, 80, 40), (60, 40, 110), (70, 70, 70))


@cache
def glyph_sheet() -> np.ndarray:
    """Return the bundled glyphs as coverage in [0, 1], shape (fonts, 36, 8, 8)."""
    sheet = np.asarray(Image.open(Path(__file__).parent / "data" / "glyphs.png").convert("L"), dtype=np.float32) / 255
    fonts = sheet.shape[0] // TILE
    return sheet.reshape(fonts, TILE, len(GLYPHS), TILE).swapaxes(1, 2)


@cache
def _shape_mask(shape: str) -> np.ndarray:
    y, x = np.mgrid[:TILE, :TILE] - (TILE - 1) / 2
    radius = np.hypot(x, y)
    masks = {
        "circle": radius <= 3.2,
        "square": np.maximum(abs(x), abs(y)) <= 3,
        "triangle": (y <= 3) & (y >= -3) & (abs(x) <= (y + 3.5) / 2 + 0.3),
        "cross": (np.minimum(abs(x), abs(y)) <= 0.6) & (np.maximum(abs(x), abs(y)) <= 3.2),
        "ring": (radius <= 3.7) & (radius >= 2.2),
        "diamond": abs(x) + abs(y) <= 3.6,
    }
    return masks[shape].astype(np.float32)


def _canvas(rng: np.random.Generator) -> np.ndarray:
    background = rng.uniform(205, 255, size=3) * np.ones((SIZE, SIZE, 1))
    return background.astype(np.float32)


def _paint(canvas: np.ndarray, row: int, column: int, coverage: np.ndarray, colour) -> None:
    y, x = row * TILE, column * TILE
    height, width = coverage.shape
    area = canvas[y : y + height, x : x + width]
    area += coverage[..., None] * (np.asarray(colour, dtype=np.float32) - area)


def _finish(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noisy = canvas + rng.normal(0, rng.uniform(2, 10), size=canvas.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def draw_text(text: str, font: int, rng: np.random.Generator) -> tuple[np.ndarray, dict[int, int]]:
    """Write `text` (at most 6 glyphs) in one row. Returns uint8 (48, 48, 3) and {tile index: glyph index}."""
    canvas = _canvas(rng)
    row, start = int(rng.integers(GRID)), int(rng.integers(GRID - len(text) + 1))
    ink = INKS[rng.integers(len(INKS))]
    labels = {}
    for offset, letter in enumerate(text):
        glyph = GLYPHS.index(letter)
        _paint(canvas, row, start + offset, glyph_sheet()[font, glyph], ink)
        labels[row * GRID + start + offset] = glyph
    return _finish(canvas, rng), labels


def draw_icon(bits: np.ndarray, colour, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Draw an icon, `bits` (6, 3) its left half. Returns uint8 (48, 48, 3) and the indices of the tiles it covers."""
    canvas = _canvas(rng)
    row, column = (int(v) for v in rng.integers(1, GRID - ICON_TILES, size=2))
    cells = np.concatenate([bits, bits[:, ::-1]], axis=1).astype(np.float32)
    _paint(canvas, row, column, cells.repeat(CELL, 0).repeat(CELL, 1), colour)
    tiles = [(row + i) * GRID + column + j for i in range(ICON_TILES) for j in range(ICON_TILES)]
    return _finish(canvas, rng), tiles


def draw_shapes(shape: str, colour: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Draw `count` equal shapes in tiles of their own. Returns uint8 (48, 48, 3) and the tile indices."""
    canvas = _canvas(rng)
    tiles = [int(tile) for tile in rng.choice(GRID * GRID, size=count, replace=False)]
    for tile in tiles:
        _paint(canvas, tile // GRID, tile % GRID, _shape_mask(shape), COLOURS[colour])
    return _finish(canvas, rng), tiles
