"""Scenes: a pure function of split and index, no two splits alike, and labels that a slow rasteriser confirms."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from lit_reduce.pocket.backgrounds import PHOTOS, photos
from lit_reduce.pocket.fonts import FONTS, SEEN, UNSEEN, font_file, text_box
from lit_reduce.pocket.labels import FIELDS, KINDS, patch_labels
from lit_reduce.pocket.render import draw, render, text_outline
from lit_reduce.pocket.shapes import Point, outline
from lit_reduce.pocket.words import COLORS, SHADES
from lit_reduce.pocket.world import GRID, LARGE, PATCH, SIZE, SPLITS, Scene, Thing, make_scene, scene_rng


def test_a_scene_and_its_picture_repeat_and_ignore_the_global_random_stream() -> None:
    first, picture = make_scene("train", 5), np.asarray(render(make_scene("train", 5)))
    np.random.seed(3)  # noqa: NPY002
    assert make_scene("train", 5) == first
    np.testing.assert_array_equal(np.asarray(render(first)), picture)
    assert picture.shape == (SIZE, SIZE, 3)


def test_splits_and_streams_are_disjoint() -> None:
    names = list(SPLITS)
    assert names == ["train", "val", "test", "unseen"]
    scenes = [make_scene(split, index) for split in names for index in range(30)]
    assert len({scene.things for scene in scenes}) == len(scenes)
    assert len({scene.seed for scene in scenes}) == len(scenes)
    starts = [scene_rng(split, i, k).integers(1 << 62) for split in names for i in range(5) for k in range(6)]
    assert len(set(starts)) == len(starts)


def test_things_are_apart_inside_the_picture_and_clearly_large_or_small() -> None:
    for index in range(40):
        scene = make_scene("val", index)
        boxes = [np.array(outline(t)) for t in scene.things if t.kind != "bar"]
        for points in boxes:
            assert points.min() >= -1e-6
            assert points.max() <= SIZE + 1e-6
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert (a.max(0) < b.min(0)).any() or (b.max(0) < a.min(0)).any()
        if len(boxes) > 1:  # a lonely shape may have any size
            assert all(abs(max(t.w, t.h) - LARGE) >= 4 - 1e-9 for t in scene.shapes)


def test_centres_lie_anywhere_or_as_near_the_middle_of_a_patch_as_training_asks() -> None:
    def off(jitter: float) -> np.ndarray:
        things = [t for i in range(60) for t in make_scene("train", i, jitter).things if t.kind != "bar"]
        return np.array([(t.x % PATCH - PATCH / 2, t.y % PATCH - PATCH / 2) for t in things if max(t.w, t.h) < 30])

    counts = np.histogram(off(7.0), bins=7, range=(-7, 7))[0]
    assert counts.min() > 0.7 * counts.mean()
    assert np.quantile(np.abs(off(1.5)), 0.95) <= 1.5  # all but lonely shapes


def test_a_scene_has_the_typefaces_and_photographs_of_its_split() -> None:
    assert len(SEEN) >= 12
    assert len(UNSEEN) == 4
    used = {unseen: {font_file(which, unseen) for which in range(1000)} for unseen in (False, True)}
    assert not used[False] & used[True]
    assert used[False] == {path for styles in SEEN for path in styles}
    assert all(path.is_file() for path in used[False] | used[True])
    assert [make_scene(split, 0).unseen for split in SPLITS] == [False, False, False, True]
    kinds = {split: {make_scene(split, i).background for i in range(80)} for split in ("train", "test", "unseen")}
    assert kinds["train"] == kinds["test"]
    assert kinds["train"] & kinds["unseen"] == {"photo"}
    seen, unseen = ({image.tobytes() for image in photos(kind)} for kind in (False, True))
    assert len(unseen) >= 4
    assert not seen & unseen


@pytest.mark.parametrize("folder", [PHOTOS, FONTS])
def test_every_photograph_and_typeface_has_a_source(folder: Path) -> None:
    sources = (folder / "SOURCES.md").read_text()
    names = [path.stem for path in folder.rglob("*") if path.suffix in (".jpg", ".ttf", ".otf")]
    assert names
    assert all(name in sources for name in names)


def test_shades_of_colours_do_not_meet() -> None:
    """What may be drawn of one colour is far from what may be drawn of another, in the order red, green, blue."""
    rng = np.random.default_rng(0)
    drawn = {}
    for color, shades in SHADES.items():
        assert COLORS[color] in shades
        every = np.array(shades, float)
        a, b = (every[rng.integers(len(every), size=200)] for _ in range(2))
        drawn[color] = a + rng.random((200, 1)) * (b - a)
    names = list(drawn)
    gaps = {
        (a, b): float(np.linalg.norm(drawn[a][:, None] - drawn[b], axis=-1).min())
        for i, a in enumerate(names)
        for b in names[:i]
    }
    assert min(gaps.values()) > 30, min(gaps, key=lambda pair: gaps[pair])


def test_things_are_drawn_in_their_shade_where_the_scene_says() -> None:
    compared = 0
    for index in range(20):
        scene = make_scene("test", index)
        pixels = np.asarray(draw(scene)).astype(int)
        for t in scene.things:
            if t.number or t.word or t.kind == "bar" or min(t.w, t.h) < 20:
                continue
            y, x = int(t.y), int(t.x)
            seen = pixels[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0)
            assert t.shade is not None
            assert np.abs(seen - t.shade).max() <= 45  # some are a little darker or lighter on one side
            compared += 1
    assert compared > 20


def test_a_picture_of_another_size_shows_the_same_scene() -> None:
    scene = make_scene("val", 2)
    drawn = draw(scene)
    for side in (200, 672):
        other = draw(scene, side)
        assert other.size == render(scene, side).size == (side, side)
        again = np.asarray(other.resize((SIZE, SIZE)), float)
        assert np.abs(again - np.asarray(drawn)).mean() < 6


def test_print_fills_the_box_that_the_labels_take_it_for() -> None:
    checked = 0
    for index in range(12):
        scene = make_scene("val", index)
        for n, t in enumerate(t for t in scene.things if t.text):
            if n > 2:
                break
            plain = Thing("sign", "sign", t.color, t.x, t.y, t.w, t.h, t.angle, None, t.word or t.number, t.font,
                          t.font_size, t.upper, t.turn, t.tilt, 0.5, t.shade)  # fmt: skip
            empty = dataclasses.replace(plain, word=None)
            with_text, without = (
                np.asarray(draw(Scene((1, index), "plain", 0, (thing,))), int) for thing in (plain, empty)
            )
            rows, columns = np.nonzero(np.abs(with_text - without).sum(-1) > 60)
            box = np.array(text_outline(plain, False))
            found = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]])
            assert (np.abs(found - [box.min(0), box.max(0)]) <= 2.5 + 0.12 * np.ptp(box, axis=0).max()).all()
            assert (found[0] >= box.min(0) - 1.5).all()
            assert (found[1] <= box.max(0) + 1.5).all()
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("index", [0, 1, 2, 3, 7])
def test_patch_labels_equal_a_slow_rasteriser(index: int) -> None:
    scene = make_scene("val", index)
    found = {field: values.reshape(GRID, GRID) for field, values in patch_labels(scene).items()}
    body = np.stack([share_inside(outline(t)) for t in scene.things])
    ink = np.stack([share_inside(text_outline(t, False)) if t.text else np.zeros((GRID, GRID)) for t in scene.things])
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


def share_inside(points: list[Point]) -> np.ndarray:
    """Share of each patch inside an outline: even-odd rule at the middle of every pixel."""
    at = np.arange(0.5, SIZE)
    x, y = np.meshgrid(at, at)
    inside = np.zeros(x.shape, bool)
    for (x1, y1), (x2, y2) in zip(points, [*points[1:], points[0]], strict=True):
        if y1 == y2:
            continue
        crosses = (y1 > y) != (y2 > y)
        inside ^= crosses & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return inside.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3))


def test_a_tilted_thing_is_what_a_camera_sees_of_a_plane() -> None:
    """A projective map keeps straight lines straight and the middle in its place."""
    thing = Thing("sign", "sign", "red", 100.0, 120.0, 60.0, 40.0, 5.0, tilt=(0.1, 0.08, -0.05))
    upper_left, upper_right, lower_right, lower_left = (np.array(p) for p in outline(thing))
    assert np.linalg.norm(lower_right - upper_right) != pytest.approx(np.linalg.norm(lower_left - upper_left), rel=0.05)

    def crossing(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        t = np.linalg.solve(np.column_stack([b - a, c - d]), c - a)[0]
        return a + t * (b - a)

    np.testing.assert_allclose(crossing(upper_left, lower_right, upper_right, lower_left), [100, 120], atol=1e-9)


def test_print_is_measured_as_it_is_drawn() -> None:
    left, top, right, bottom = text_box("88", 0, 20, False)
    assert (left, top) == (-right, -bottom) or abs(left + right) < 3
    assert 18 < right - left < 32
    assert 12 < bottom - top < 20


def test_outlines_fill_the_box_that_the_scene_reserves() -> None:
    for shape in ("circle", "rectangle", "triangle", "star", "cross", "diamond", "sign"):
        thing = Thing("shape", shape, "red", 100.0, 120.0, 40.0, 30.0)
        points = np.array(outline(thing))
        assert np.ptp(points[:, 1]) >= 26
        assert (np.abs(points - [100, 120]) <= [20.001, 15.001 if shape != "star" else 20.001]).all()
        turned = np.array(outline(dataclasses.replace(thing, angle=10.0)))
        back = rotate(turned - [100, 120], -10.0)
        np.testing.assert_allclose(back, points - [100, 120], atol=1e-9)


def rotate(points: np.ndarray, degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return points @ np.array([[c, s], [-s, c]])
