"""Typefaces of the rendered world, those kept for the split "unseen" apart (fonts/SOURCES.md names their origin)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from matplotlib import get_data_path
from PIL import ImageFont

FONTS = Path(__file__).parent / "fonts"
SCALE = 2  # pictures are drawn at twice their size, then averaged: smooth edges


def _installed(*names: str) -> tuple[Path, ...]:
    return tuple(Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf" for name in names)


def _kept(letter: str) -> tuple[Path, ...]:
    return tuple(sorted(FONTS.glob(f"{letter}[0-9].*")))


SEEN = (
    _installed("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique"),
    _installed("DejaVuSerif", "DejaVuSerif-Bold"),
    _installed("DejaVuSansMono", "DejaVuSansMono-Bold"),
    _installed("STIXGeneral", "STIXGeneralBol"),
    *(_kept(letter) for letter in "abcdefgh"),
)
UNSEEN = tuple(_kept(letter) for letter in "ijkl")
"""Typefaces, each with its styles."""


def font_file(which: int, unseen: bool) -> Path:
    """Returns the file of a typeface and style; any non-negative number names one of each."""
    typefaces = UNSEEN if unseen else SEEN
    styles = typefaces[which % len(typefaces)]
    return styles[which // len(typefaces) % len(styles)]


@lru_cache(maxsize=1024)
def font(which: int, size: int, unseen: bool) -> ImageFont.FreeTypeFont:
    """Returns a font for the canvas; its size is in pixels of the picture."""
    layout = ImageFont.Layout.BASIC  # the same on every machine
    return ImageFont.truetype(str(font_file(which, unseen)), size * SCALE, layout_engine=layout)


def text_box(text: str, which: int, size: int, unseen: bool) -> tuple[float, float, float, float]:
    """Returns left, top, right and bottom of printed pixels around the middle of a text, in pixels of the picture."""
    left, top, right, bottom = font(which, size, unseen).getbbox(text, anchor="mm")
    return left / SCALE, top / SCALE, right / SCALE, bottom / SCALE
