"""Outlines of things: several forms of each shape, turned, sheared and seen a little from the side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lit_reduce.pocket.world import Thing

Point = tuple[float, float]
DROP = {"triangle": 0.17, "star": 0.03}  # how far below the middle print stands, as a share of the height


def outline(thing: Thing) -> list[Point]:
    """Returns the corner points of a thing, in pixels."""
    return placed(view(thing, thing.angle), _flat(thing), (thing.x, thing.y))


def text_centre(thing: Thing) -> Point:
    """Returns the middle of the print on a thing, in pixels."""
    drop = DROP.get(thing.shape, 0.0) * thing.h
    return placed(view(thing, thing.angle), [(0.0, drop)], (thing.x, thing.y))[0]


def text_view(thing: Thing) -> np.ndarray:
    """Returns the projective map [3, 3] of the print on a thing, around its middle; lengths in pixels."""
    return view(thing, thing.turn)


def placed(matrix: np.ndarray, points: list[Point], centre: Point) -> list[Point]:
    """Maps points around (0, 0) projectively, then moves them to a centre."""
    x, y, depth = matrix @ np.column_stack([points, np.ones(len(points))]).T
    return list(zip((centre[0] + x / depth).tolist(), (centre[1] + y / depth).tolist(), strict=True))


def view(thing: Thing, degrees: float) -> np.ndarray:
    """Returns the projective map [3, 3] that turns by so many degrees, shears, and tilts out of the picture."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    shear, right, down = thing.tilt
    half = max(thing.w, thing.h) / 2
    turned = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    sheared = np.array([[1, shear, 0], [0, 1, 0], [0, 0, 1]])
    tilted = np.array([[1, 0, 0], [0, 1, 0], [right / half, down / half, 1]])
    return np.asarray(tilted @ sheared @ turned)


def _flat(thing: Thing) -> list[Point]:
    """Corner points around (0, 0) before the thing is turned; ``form`` chooses among the forms of a shape."""
    hw, hh, form = thing.w / 2, thing.h / 2, thing.form
    match thing.shape:
        case "circle":
            return [(hw * math.cos(a), hh * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 40, endpoint=False)]
        case "triangle":
            return [(hw * (form - 0.5) * 0.7, -hh), (hw, hh), (-hw, hh)]
        case "diamond":
            wide = 0.6 + 0.4 * form
            return [(0, -hh), (hw * wide, 0), (0, hh), (-hw * wide, 0)]
        case "star":
            tips = 6 if form > 0.8 else 5
            inner = 0.38 + 0.2 * form if tips == 5 else 0.58
            radii = [(1.0, inner)[i % 2] for i in range(2 * tips)]
            turn = [math.pi * i / tips - math.pi / 2 for i in range(2 * tips)]
            return [(hw * r * math.cos(a), hh * r * math.sin(a)) for r, a in zip(radii, turn, strict=True)]
        case "cross":
            t = 0.24 + 0.2 * form
            arms = [(-t, -1), (t, -1), (t, -t), (1, -t), (1, t), (t, t), (t, 1), (-t, 1), (-t, t), (-1, t), (-1, -t)]
            return [(x * hw, y * hh) for x, y in [*arms, (-t, -t)]]
        case "rectangle" | "sign" if form > 0.65:
            return _rounded(hw, hh, (form - 0.6) * min(hw, hh))
        case _:
            return [(-hw, -hh), (hw, -hh), (hw, hh), (-hw, hh)]


def _rounded(hw: float, hh: float, radius: float) -> list[Point]:
    """A rectangle with round corners."""
    out = []
    for quarter, (x, y) in enumerate([(hw, hh), (-hw, hh), (-hw, -hh), (hw, -hh)]):
        for step in range(4):
            a = math.pi / 2 * (quarter + step / 3)
            out.append((x - math.copysign(radius, x) + radius * math.cos(a),
                        y - math.copysign(radius, y) + radius * math.sin(a)))  # fmt: skip
    return out
