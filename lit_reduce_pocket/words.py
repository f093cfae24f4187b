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
