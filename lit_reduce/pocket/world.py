"""The world that pocket sees: scenes of shapes, signs and bar charts, each a pure function of (split, index)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lit_reduce.pocket.fonts import text_box
from lit_reduce.pocket.shapes import outline
from lit_reduce.pocket.words import COLORS, DIGITS, PRINTED, SHADES, SHAPES

SIZE = 336  # pixels a side, LLaVA-1.5's
PATCH = 14
GRID = SIZE // PATCH
# The last one has typefaces, backgrounds and photographs that no other has.
SPLITS = {"train": 0, "val": 1, "test": 2, "unseen": 3}
JITTER = PATCH / 2  # pixels that centres lie off the middle of a patch at most; at 7 they lie anywhere
ROOM = {"circle": 0.6, "rectangle": 0.74, "triangle": 0.4, "star": 0.38}  # share of a shape that print may fill
LARGE = 38  # pixels of diameter from which a shape is called large; none is drawn within 4 pixels of it
# Larger than most print on photographs: a tower of 2.7 M parameters reads little below 16 px.
PRINT = (16, 34)  # pixels of numbers
SIGN = (17, 30)  # pixels of words
BACKGROUNDS = ("plain", "gradient", "stripes", "noise", "photo"), (0.18, 0.13, 0.1, 0.11, 0.48)
UNSEEN_BACKGROUNDS = ("radial", "checks", "dots", "clouds", "photo"), (0.15, 0.1, 0.1, 0.15, 0.5)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    """One thing in a scene; lengths in pixels, (x, y) its centre."""

    kind: str  # "shape", "sign" or "bar"
    shape: str
    color: str
    x: float
    y: float
    w: float
    h: float
    angle: float = 0.0  # degrees
    number: str | None = None
    word: str | None = None
    font: int = 0
    font_size: int = 0
    upper: bool = False
    turn: float = 0.0  # degrees by which print is turned
    tilt: tuple[float, float, float] = (0.0, 0.0, 0.0)  # shear, and how much nearer the left and the upper edge are
    form: float = 0.5  # which form of its shape, from 0 to 1
    shade: tuple[int, int, int] | None = None  # the middle one of its colour where none is given

    @property
    def large(self) -> bool:
        """Whether the captions call it large."""
        return max(self.w, self.h) >= LARGE

    @property
    def text(self) -> str:
        """What is printed on it, or nothing."""
        text = self.number or self.word or ""
        return text.upper() if self.upper else text


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn."""

    seed: tuple[int, int]
    background: str  # one of BACKGROUNDS or UNSEEN_BACKGROUNDS
    clutter: int
    things: tuple[Thing, ...]
    chart: Box | None = None  # left, top, right, bottom of the panel

    @property
    def shapes(self) -> list[Thing]:
        """The shapes, without signs and bars."""
        return [t for t in self.things if t.kind == "shape"]

    @property
    def signs(self) -> list[Thing]:
        """The signs."""
        return [t for t in self.things if t.kind == "sign"]

    @property
    def bars(self) -> list[Thing]:
        """The bars of the chart, left to right."""
        return [t for t in self.things if t.kind == "bar"]

    @property
    def unseen(self) -> bool:
        """Whether its typefaces and backgrounds are those that no training scene has."""
        return self.seed[0] == SPLITS["unseen"]


def scene_rng(split: str, index: int, stream: int = 0) -> np.random.Generator:
    """Returns the generator of one scene; streams and splits never share a state."""
    return np.random.default_rng(np.random.SeedSequence([SPLITS[split], index, stream]))


def make_scene(split: str, index: int, jitter: float = JITTER) -> Scene:
    """Draws the content of scene `index` of a split.

    Args:
        split: "train", "val", "test" or "unseen"; their seeds are disjoint, since the split is part of the seed.
        index: Any non-negative integer.
        jitter: Pixels that centres lie off the middle of a patch at most. Training starts with few: a small tower
            learns print ten times faster so.
    """
    rng = scene_rng(split, index)
    seed = (SPLITS[split], index)
    kinds, chances = UNSEEN_BACKGROUNDS if split == "unseen" else BACKGROUNDS
    background = str(rng.choice(kinds, p=chances))
    if rng.random() < 0.08:
        return _lonely(rng, seed, kinds[0])
    builder = _Builder(rng, jitter, split == "unseen")
    chart = builder.chart() if rng.random() < 0.5 else None
    builder.signs(int(rng.integers(0, 4)))
    builder.shapes(int(rng.integers(5, 15)))
    return Scene(seed, background, int(rng.integers(0, 14)), tuple(builder.things), chart)


def _lonely(rng: np.random.Generator, seed: tuple[int, int], background: str) -> Scene:
    """One shape of any size on a plain background, as in simple public data sets."""
    w = rng.uniform(30, 170)
    h = w if rng.random() < 0.6 else rng.uniform(40, 170)
    x, y = rng.uniform(w / 2, SIZE - w / 2), rng.uniform(h / 2, SIZE - h / 2)
    shape, color = str(rng.choice(SHAPES[:3] if rng.random() < 0.7 else SHAPES)), str(rng.choice(list(COLORS)))
    size = h if shape == "rectangle" else w
    y = min(max(y, size / 2), SIZE - size / 2)
    thing = Thing("shape", shape, color, x, y, w, size, form=rng.random(), shade=_shade(rng, color))
    return Scene(seed, background, 0, (thing,))


class _Builder:
    """Places things of a scene one after another, each where there is room."""

    def __init__(self, rng: np.random.Generator, jitter: float, unseen: bool) -> None:
        self.rng, self.jitter, self.unseen = rng, jitter, unseen
        self.boxes: list[Box] = []
        self.things: list[Thing] = []

    def place(self, w: float, h: float, gap: float = 2) -> tuple[float, float] | None:
        """Finds a free centre for a w x h box, or None after 40 tries; the box is then taken."""
        rng = self.rng
        for _ in range(40):
            x, y = rng.uniform(w / 2 + 1, SIZE - w / 2 - 1), rng.uniform(h / 2 + 1, SIZE - h / 2 - 1)
            x, y = (PATCH * (v // PATCH) + PATCH / 2 + self.jitter * rng.uniform(-1, 1) for v in (x, y))
            if min(x - w / 2, y - h / 2, SIZE - x - w / 2, SIZE - y - h / 2) < 1:
                continue
            left, top, right, bottom = x - w / 2 - gap, y - h / 2 - gap, x + w / 2 + gap, y + h / 2 + gap
            if all(right < bl or left > br or bottom < bt or top > bb for bl, bt, br, bb in self.boxes):
                self.boxes.append((left, top, right, bottom))
                return x, y
        return None

    def put(self, thing: Thing) -> None:
        """Adds a thing, described around (0, 0), where its outline has room."""
        x, y = np.abs(outline(thing)).max(0)
        spot = self.place(2 * x, 2 * y)
        if spot is not None:
            self.things.append(replace(thing, x=spot[0], y=spot[1]))

    def chart(self) -> Box | None:
        """Adds the bars of a chart; returns its panel."""
        rng = self.rng
        n = int(rng.integers(3, 6))
        bar = rng.uniform(14, 22)
        step = bar + rng.uniform(4, 10)
        w, h = n * step + 14, rng.uniform(96, 132)
        spot = self.place(w, h)
        if spot is None:
            return None
        left, bottom = spot[0] - w / 2, spot[1] + h / 2
        low, high, second = rng.uniform(12, 18), h - rng.uniform(12, 18), rng.uniform(32, 38)
        heights = [low, high, *rng.uniform(second, high - 18, n - 2)]
        rng.shuffle(heights)
        colors = rng.choice(list(COLORS), n, replace=False)
        for i, tall in enumerate(heights):
            x, color = left + 7 + step * (i + 0.5), str(colors[i])
            bar_i = Thing("bar", "bar", color, x, bottom - 5 - tall / 2, bar, tall, shade=_shade(rng, color))
            self.things.append(bar_i)
        return left, spot[1] - h / 2, spot[0] + w / 2, bottom

    def signs(self, n: int) -> None:
        """Adds up to n signs, their words and colours all different."""
        rng = self.rng
        words = rng.choice(PRINTED, n, replace=False)
        colors = rng.choice(list(COLORS), n, replace=False)
        for word, color in zip(words.tolist(), colors.tolist(), strict=True):
            size, which, upper = int(rng.integers(*SIGN)), int(rng.integers(0, 1 << 16)), bool(rng.random() < 0.5)
            box = text_box(word.upper() if upper else word, which, size, self.unseen)
            w, h = box[2] - box[0] + rng.uniform(8, 18), size * rng.uniform(1.1, 1.6) + 4
            angle = rng.uniform(-8, 8)
            self.put(Thing("sign", "sign", color, 0.0, 0.0, w, h, angle, None, word, which, size, upper, angle,
                           _tilt(rng), rng.random(), _shade(rng, color)))  # fmt: skip

    def shapes(self, n: int) -> None:
        """Adds up to n shapes, half of them with numbers."""
        # A skewed palette makes some shapes and colours single (so that "the star" means one thing), others many.
        rng, shape_p, color_p = self.rng, _skewed(self.rng, len(SHAPES)), _skewed(self.rng, len(COLORS))
        for size in sorted(np.exp(rng.uniform(np.log(15), np.log(90), n)).tolist(), reverse=True):
            shape, color = str(rng.choice(SHAPES, p=shape_p)), str(rng.choice(list(COLORS), p=color_p))
            number, d, form = None, size, rng.random()
            if rng.random() < 0.5:
                number = str(rng.integers(1, 100)) if rng.random() < 0.7 else str(rng.choice(DIGITS))
                d = max(d, rng.uniform(30, 42) if shape in ("circle", "rectangle") else rng.uniform(44, 54))
                form = max(form, 0.5) if shape in ("cross", "diamond") else form
            if abs(d - LARGE) < 4:
                d = LARGE + (4.0 if d >= LARGE else -4.0)
            w = h = d
            if shape == "rectangle":
                h = max(d * rng.uniform(0.55, 1.0), 25.0 if number else 0)
                w, h = (h, w) if rng.random() < 0.3 and not number else (w, h)
            font_size = int(np.clip(rng.uniform(0.85, 1.0) * min(w, h) * ROOM.get(shape, 0.44), *PRINT))
            angle, turn = rng.uniform(-14, 14), rng.uniform(-8, 8)
            if shape == "triangle" and rng.random() < 0.3:
                angle += 90.0 * int(rng.integers(1, 4))
            elif shape == "star":
                angle = rng.uniform(-36, 36)
            elif shape == "diamond":
                angle *= 0.6
            self.put(Thing("shape", shape, color, 0.0, 0.0, w, h, angle, number, None, int(rng.integers(0, 1 << 16)),
                           font_size, False, turn, _tilt(rng), form, _shade(rng, color)))  # fmt: skip


def _tilt(rng: np.random.Generator) -> tuple[float, float, float]:
    """Draws a slight view from the side for half of the things."""
    if rng.random() < 0.5:
        return 0.0, 0.0, 0.0
    shear, right, down = rng.uniform(-1, 1, 3) * (0.15, 0.08, 0.08)
    return float(shear), float(right), float(down)


def _shade(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    """Draws a shade of a colour, mixed from two of its shades."""
    shades = np.asarray(SHADES[color], float)
    first, second = shades[rng.integers(len(shades), size=2)]
    mixed = first + rng.random() * (second - first) + rng.uniform(-8, 8, 3)
    red, green, blue = np.clip(mixed, 0, 255).astype(int).tolist()
    return red, green, blue


def _skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    p = 0.75 ** np.arange(n)
    rng.shuffle(p)
    return np.asarray(p / p.sum())
