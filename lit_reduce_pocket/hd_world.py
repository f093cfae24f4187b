"""Scenes of 672 px for pocket-hd, each drawn from four scenes of pocket; the print measures 14 to 26 px."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from PIL import Image

from lit_reduce.data.groups import Group
from lit_reduce.data.jsonl import Row
from lit_reduce_pocket.data import Drawing, groups_of, rows_of
from lit_reduce_pocket.render import render
from lit_reduce_pocket.world import SIZE, Scene, Thing, make_scene, scene_rng

TILES = 2  # a side
WIDE = TILES * SIZE
STREAM = 8  # of randomness, see `scene_rng`


def hd_scene(split: str, index: int) -> tuple[Scene, list[Scene]]:
    """A scene of 672 px, things and all in its own pixels, and the four scenes of pocket that it is drawn from.

    Together the four have about as many things as one scene of pocket: some shapes of each, signs whose colours and
    words differ, one chart at most. So questions stay as clear as there.
    """
    rng, parts = scene_rng(split, index, STREAM), []
    charted, words, colors = int(rng.integers(TILES**2)), set[str | None](), set[str]()
    everything: list[Thing] = []
    chart = None
    for number in range(TILES**2):
        scene = make_scene(split, TILES**2 * index + number)
        left, top = SIZE * (number % TILES), SIZE * (number // TILES)
        shapes = [t for t in scene.shapes if rng.random() < 0.4][:5]
        signs = [t for t in scene.signs if t.word not in words and t.color not in colors][:1]
        words |= {t.word for t in signs}
        colors |= {t.color for t in signs}
        panel = scene.chart if number == charted else None
        things = tuple(t for t in scene.things if t in shapes or t in signs or (panel is not None and t.kind == "bar"))
        parts.append(replace(scene, things=things, chart=panel))
        everything += [replace(t, x=t.x + left, y=t.y + top) for t in things]
        if panel is not None:
            chart = panel[0] + left, panel[1] + top, panel[2] + left, panel[3] + top
    return Scene((parts[0].seed[0], index), "parts", 0, tuple(everything), chart), parts


def draw(parts: Sequence[Scene]) -> Image.Image:
    """The picture of four scenes: RGB, 672 x 672."""
    image = Image.new("RGB", (WIDE, WIDE))
    for number, part in enumerate(parts):
        image.paste(render(part), (SIZE * (number % TILES), SIZE * (number // TILES)))
    return image


def hd_drawing(split: str, index: int) -> Drawing:
    """A scene and what draws it."""
    scene, parts = hd_scene(split, index)
    return scene, partial(draw, parts)


def hd_groups(split: str, count: int, turns: int) -> list[Group]:
    """The first ``count`` scenes of a split, each with its questions and answers."""
    return groups_of(hd_drawing, "hd1", split, count, turns)


def hd_rows(split: str, count: int) -> Iterator[Row]:
    """One question a scene, see `data.rows_of`."""
    return rows_of(hd_drawing, split, count)
