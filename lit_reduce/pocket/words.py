"""Every word that pocket knows: what can be seen, what can be printed, and what can be asked."""

from __future__ import annotations

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (244, 8, 8),
    "green": (10, 134, 20),
    "blue": (12, 20, 244),
    "yellow": (250, 244, 16),
    "purple": (146, 30, 190),
    "orange": (255, 142, 12),
    "black": (12, 12, 12),
    "white": (246, 246, 246),
    "gray": (128, 128, 128),
    "teal": (6, 132, 132),
    "brown": (156, 46, 40),
}
# Further shades of each colour; what is drawn is mixed from two of them.
SHADES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((244, 8, 8), (208, 20, 34), (236, 56, 56), (255, 40, 24)),
    "green": ((10, 134, 20), (44, 172, 64), (96, 190, 72), (0, 100, 34), (120, 206, 56)),
    "blue": ((12, 20, 244), (30, 84, 222), (22, 40, 156), (72, 122, 240), (56, 146, 250)),
    "yellow": ((250, 244, 16), (246, 220, 44), (255, 238, 110), (232, 208, 0)),
    "purple": ((146, 30, 190), (108, 40, 160), (172, 84, 204), (128, 0, 128), (88, 20, 132)),
    "orange": ((255, 142, 12), (246, 120, 30), (250, 164, 60), (230, 112, 0)),
    "black": ((12, 12, 12), (32, 32, 36), (0, 0, 0), (40, 36, 36)),
    "white": ((246, 246, 246), (255, 255, 255), (236, 236, 228)),
    "gray": ((128, 128, 128), (104, 108, 112), (150, 150, 154), (172, 172, 168)),
    "teal": ((6, 132, 132), (0, 152, 140), (36, 172, 166), (0, 108, 116)),
    "brown": ((156, 46, 40), (120, 70, 30), (139, 69, 19), (100, 56, 24), (160, 96, 52)),
}
SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "diamond")
PRINTED = (
    "milk", "tea", "open", "stop", "cafe", "book", "fish", "door", "lamp", "bus", "taxi", "exit",
    "shop", "farm", "king", "zoo", "jazz", "hotel", "quiz", "wave", "pub", "gym", "next", "rock",
)  # fmt: skip
DIGITS = tuple("0123456789")
SIDES = ("left", "right", "above", "below")

_ASKED = (
    "what color is the shape object number on word sign how many objects signs bars are there a an describe "
    "bar tallest shortest chart small large with leftmost rightmost highest lowest of yes no "
    "circles rectangles triangles stars crosses diamonds in image does contain not present picture and answer"
)
SPECIAL = ("[PAD]", "[UNK]", "<s>", "</s>", "<image>")
PUNCTUATION = tuple("?.,:'\"!-")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


def plural(shape: str) -> str:
    """Returns the plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def vocabulary() -> list[str]:
    """Returns the word pieces in id order: whole words first, then letters and digits to spell any other with."""
    words = [*COLORS, *SHAPES, *PRINTED, *SIDES, *_ASKED.split()]
    pieces = [*SPECIAL, *PUNCTUATION, *DIGITS, *(f"##{d}" for d in DIGITS), *words]
    pieces += [*LETTERS, *(f"##{c}" for c in LETTERS)]
    return list(dict.fromkeys(pieces))
