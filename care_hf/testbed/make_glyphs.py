"""Draw ``data/glyphs.png`` from DejaVu fonts: ``python -m care_hf.testbed.make_glyphs FOLDER_WITH_TTF_FILES``.

The sheet is bundled, so this runs only when the fonts of the world change. The last rows, `drawing.HELD_OUT_FONTS`, are
fonts that the testbed's models never see in training.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .drawing import GLYPHS, TILE

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansCondensed",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-ExtraLight",
    "DejaVuSansCondensed-Bold",
    "DejaVuSansCondensed-Oblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerifCondensed-Bold",
    "DejaVuSerifCondensed-BoldItalic",
    "DejaVuSerifCondensed-Italic",
    # held out
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif-Italic",
    "DejaVuSansCondensed-BoldOblique",
    "DejaVuSerifCondensed",
)


def tile(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Draw one glyph centred on its own ink, uint8 (8, 8)."""
    canvas = Image.new("L", (4 * TILE, 4 * TILE))
    ImageDraw.Draw(canvas).text((TILE, TILE), letter, font=font, fill=255)
    left, top, right, bottom = canvas.getbbox()
    x, y = (left + right - TILE) // 2, (top + bottom - TILE) // 2
    return np.asarray(canvas.crop((x, y, x + TILE, y + TILE)))


def main() -> None:
    """Write the sheet beside this module."""
    folder = Path(sys.argv[1])
    rows = []
    for name in FONTS:
        font = ImageFont.truetype(folder / f"{name}.ttf", 9)
        rows.append(np.concatenate([tile(letter, font) for letter in GLYPHS], axis=1))
    Image.fromarray(np.concatenate(rows)).save(Path(__file__).parent / "data" / "glyphs.png", optimize=True)


if __name__ == "__main__":
    main()
