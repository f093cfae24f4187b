"""What each patch of a scene shows, as integer labels: the dense supervision of the tower."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lit_reduce_pocket.render import owners
from lit_reduce_pocket.words import COLORS, PRINTED, SHAPES
from lit_reduce_pocket.world import GRID, PATCH, Scene

KINDS = ("background", *SHAPES, "sign", "bar", "chart")
FIELDS = {  # field -> names of its classes; class 0 is "nothing"
    "kind": KINDS,
    "color": ("none", *COLORS),
    "first": ("none", *"0123456789"),
    "second": ("none", *"0123456789"),
    "word": ("none", *PRINTED),
    "size": ("none", "small", "large"),
    "centre": ("none", "centre"),
}
SIZES = {field: len(names) for field, names in FIELDS.items()}


@dataclass(frozen=True)
class ThingLabels:
    """The label of every field of one thing."""

    kind: int
    color: int
    first: int
    second: int
    word: int
    size: int


def thing_labels(scene: Scene) -> list[ThingLabels]:
    """Returns the labels of every thing of a scene."""
    out = []
    for t in scene.things:
        number = t.number or ""
        out.append(
            ThingLabels(
                KINDS.index(t.shape),
                FIELDS["color"].index(t.color),
                1 + int(number[0]) if number else 0,
                1 + int(number[1]) if len(number) > 1 else 0,
                1 + PRINTED.index(t.word) if t.word else 0,
                (2 if t.large else 1) if t.kind == "shape" else 0,
            )
        )
    return out


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Returns field -> [576] labels; print is labelled where it is printed, shape and colour where the thing is."""
    shown, printed, centre = (a.reshape(-1) for a in owners(scene))
    labels = thing_labels(scene)
    out: dict[str, np.ndarray] = {}
    for field in ("kind", "color", "size"):
        table = np.array([getattr(t, field) for t in labels] + [0])
        out[field] = table[np.maximum(shown, printed)]
    for field in ("first", "second", "word"):
        table = np.array([getattr(t, field) for t in labels] + [0])
        out[field] = table[printed]
    out["centre"] = (centre >= 0).astype(np.int64)
    if scene.chart is not None:
        left, top, right, bottom = (v / PATCH for v in scene.chart)
        rows, cols = np.divmod(np.arange(GRID * GRID), GRID)
        panel = (cols + 0.5 > left) & (cols + 0.5 < right) & (rows + 0.5 > top) & (rows + 0.5 < bottom)
        out["kind"] = np.where(panel & (out["kind"] == 0), KINDS.index("chart"), out["kind"])
    return out
