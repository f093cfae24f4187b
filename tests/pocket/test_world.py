"""Scenes: a pure function of split and index, no two splits alike, and labels that a slow rasteriser confirms."""

import dataclasses
import math

import numpy as np
import pytest
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from lit_reduce_pocket.labels import FIELDS, KINDS, patch_labels
from lit_reduce_pocket.render import FONTS, PHOTOS, outline, render
from lit_reduce_pocket.words import COLORS
from lit_reduce_pocket.world import GRID, LARGE, PATCH, SIZE, SPLITS, Scene, Thing, make_scene, scene_rng


def test_a_scene_and_its_picture_repeat_and_ignore_the_global_random_stream() -> None:
    first, picture = make_scene("train", 5), np.asarray(render(make_scene("train", 5)))
    np.random.seed(3)  # noqa: NPY002
    assert make_scene("train", 5) == first
    np.testing.assert_array_equal(np.asarray(render(first)), picture)
    assert picture.shape == (SIZE, SIZE, 3)


def test_splits_and_streams_are_disjoint() -> None:
    names = list(SPLITS)
    assert names == ["train", "val", "test"]
    scenes = [make_scene(split, index) for split in names for index in range(30)]
    assert len({scene.things for scene in scenes}) == len(scenes)
    assert len({scene.seed for scene in scenes}) == len(scenes)
    starts = [scene_rng(split, i, k).integers(1 << 62) for split in names for i in range(5) for k in range(6)]
    assert len(set(starts)) == len(starts)


def test_things_are_apart_inside_the_picture_and_clearly_large_or_small() -> None:
    for index in range(40):
        scene = make_scene("val", index)
        things = [t for t in scene.things if t.kind != "bar"]
        for t in things:
            assert t.w / 2 - 1e-6 <= t.x <= SIZE - t.w / 2 + 1e-6
            assert t.h / 2 - 1e-6 <= t.y <= SIZE - t.h / 2 + 1e-6
        for i, a in enumerate(things):
            for b in things[:i]:
                assert abs(a.x - b.x) >= (a.w + b.w) / 2 or abs(a.y - b.y) >= (a.h + b.h) / 2
        if len(things) > 1:  # a lonely shape may have any size
            assert all(abs(t.w - LARGE) >= 4 or t.number for t in scene.shapes)


def test_every_photograph_has_a_source() -> None:
    sources = (PHOTOS / "SOURCES.md").read_text()
    names = [path.name for path in PHOTOS.glob("*.jpg")]
    assert names
    assert all(name.split(".")[0] in sources for name in names)


def test_things_are_drawn_in_their_colour_where_the_scene_says() -> None:
    compared = 0
    for index in range(12):
        scene = make_scene("test", index)
        pixels = np.asarray(render(scene)).astype(int)
        for t in scene.things:
            if t.number or t.word or t.kind == "bar" or min(t.w, t.h) < 16:
                continue
            y, x = int(t.y), int(t.x)
            seen = pixels[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0)
            assert np.abs(seen - COLORS[t.color]).max() <= 12
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("index", [0, 1, 2, 3, 7])
def test_patch_labels_equal_a_slow_rasteriser(index: int) -> None:
    scene = make_scene("val", index)
    found = {field: values.reshape(GRID, GRID) for field, values in patch_labels(scene).items()}
    body, ink = np.stack([body_share(t) for t in scene.things]), np.stack([ink_share(t) for t in scene.things])
    checked = dict.fromkeys(("kind", "print", "empty"), 0)
    for row in range(GRID):
        for col in range(GRID):
            shown, printed = owner(body[:, row, col], body), owner(ink[:, row, col], ink)
            got = {field: FIELDS[field][found[field][row, col]] for field in FIELDS}
            middle = [t for t in scene.things if (int(t.y // PATCH), int(t.x // PATCH)) == (row, col)]
            assert (got["centre"] == "centre") == bool(middle)
            if printed is not None:
                thing = scene.things[printed] if printed >= 0 else None
                number = (thing.number or "") if thing else ""
                assert got["first"] == (number[0] if number else "none")
                assert got["second"] == (number[1] if len(number) > 1 else "none")
                assert got["word"] == ((thing.word if thing else None) or "none")
                checked["print"] += printed >= 0
            if shown is None or printed is None:
                continue  # too close to call
            if max(shown, printed) < 0:
                assert got["kind"] == ("chart" if in_panel(scene, row, col) else "background")
                assert (got["color"], got["size"]) == ("none", "none")
                checked["empty"] += 1
            elif shown == printed or min(shown, printed) < 0:
                thing = scene.things[max(shown, printed)]
                size = "none" if thing.kind != "shape" else "large" if max(thing.w, thing.h) >= LARGE else "small"
                assert (got["kind"], got["color"], got["size"]) == (thing.shape, thing.color, size)
                checked["kind"] += 1
    assert checked["kind"] > 20
    assert checked["empty"] > 200
    assert checked["print"] >= sum(bool(t.number or t.word) for t in scene.things)


def test_labels_name_every_kind_of_thing() -> None:
    seen = {KINDS[k] for index in range(25) for k in np.unique(patch_labels(make_scene("train", index))["kind"])}
    assert seen == set(KINDS)


def owner(shares: np.ndarray, every: np.ndarray, unsure: float = 0.13) -> int | None:
    """The thing with the largest share of a patch, -1 for none, None where the two rasterisers may differ.

    A share counts from a fifth of the patch, or from half of the thing's best patch where that is less. The drawing
    library fills the pixels that an edge touches, so its shares are larger, of narrow things by up to an eighth.
    """
    limit = np.minimum(0.2, 0.5 * every.max((1, 2)))
    if (np.abs(shares - limit) < np.where(limit > 0, unsure, -1)).any():
        return None
    counted = np.where(limit > 0, shares * (shares >= limit), 0)
    if (np.sort(counted)[-2:].min() > 0) and np.ptp(np.sort(counted)[-2:]) < unsure:
        return None
    return int(counted.argmax()) if counted.max() > 0 else -1


def in_panel(scene: Scene, row: int, col: int) -> bool:
    if scene.chart is None:
        return False
    x, y = (col + 0.5) * PATCH, (row + 0.5) * PATCH
    return scene.chart[0] < x < scene.chart[2] and scene.chart[1] < y < scene.chart[3]


def body_share(thing: Thing, step: int = 1) -> np.ndarray:
    """Share of each patch inside the outline: even-odd rule at the middle of every pixel."""
    at = np.arange(step / 2, SIZE, step)
    x, y = np.meshgrid(at, at)
    inside = np.zeros(x.shape, bool)
    points = outline(thing)
    for (x1, y1), (x2, y2) in zip(points, [*points[1:], points[0]], strict=True):
        if y1 == y2:
            continue
        crosses = (y1 > y) != (y2 > y)
        inside ^= crosses & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    cell = PATCH // step
    return inside.reshape(GRID, cell, GRID, cell).mean((1, 3))


def ink_share(thing: Thing) -> np.ndarray:
    """Share of each patch inside the box around the printed pixels, found by printing."""
    text = thing.number or thing.word
    if not text:
        return np.zeros((GRID, GRID))
    file = f"{get_data_path()}/fonts/ttf/{FONTS[thing.font % len(FONTS)]}.ttf"
    drop = {"triangle": 0.17, "star": 0.03}.get(thing.shape, 0) * thing.h
    page = Image.new("L", (2 * SIZE, 2 * SIZE))
    ImageDraw.Draw(page).text(
        (2 * thing.x, 2 * (thing.y + drop)), text.upper() if thing.upper else text, fill=255, anchor="mm",
        font=ImageFont.truetype(file, 2 * thing.font_size),
    )  # fmt: skip
    left, top, right, bottom = (v / 2 for v in page.getbbox() or (0, 0, 0, 0))
    share = np.zeros((GRID, GRID))
    for row in range(GRID):
        for col in range(GRID):
            w = min(right, (col + 1) * PATCH) - max(left, col * PATCH)
            h = min(bottom, (row + 1) * PATCH) - max(top, row * PATCH)
            share[row, col] = max(w, 0) * max(h, 0) / PATCH**2
    return share


def test_outlines_fill_the_box_that_the_scene_reserves() -> None:
    for shape in ("circle", "rectangle", "triangle", "star", "cross", "diamond", "sign"):
        thing = Thing("shape", shape, "red", 100.0, 120.0, 40.0, 30.0)
        points = np.array(outline(thing))
        assert (np.abs(points - [100, 120]) <= [20.001, 15.001 if shape != "star" else 20.001]).all()
        turned = np.array(outline(dataclasses.replace(thing, angle=10.0)))
        back = rotate(turned - [100, 120], -10.0)
        np.testing.assert_allclose(back, points - [100, 120], atol=1e-9)


def rotate(points: np.ndarray, degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return points @ np.array([[c, s], [-s, c]])
