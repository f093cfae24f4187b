"""The transfer set: what is listed is what the code makes, and it shares nothing with the world but names."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lit_reduce.pocket import transfer
from lit_reduce.pocket.fonts import SEEN, UNSEEN
from lit_reduce.pocket.quality import moved
from lit_reduce.pocket.render import render
from lit_reduce.pocket.words import COLORS, SHAPES
from lit_reduce.pocket.world import LARGE, SIZE, make_scene

LISTED = Path(transfer.__file__).with_suffix(".jsonl")


def test_the_listed_questions_are_those_that_the_code_asks() -> None:
    listed = [json.loads(line) for line in LISTED.read_text().splitlines()]
    made = [
        {"scene": i, "family": q.family, "prompt": q.prompt, "answer": q.answer}
        for i in range(transfer.SCENES)
        for q in transfer.transfer_questions(i)[1]
    ]
    assert listed == made
    assert len(made) == 500
    assert min(Counter(row["family"] for row in made).values()) > 30


def test_things_lie_inside_apart_and_are_clearly_large_or_small() -> None:
    shapes = set()
    for index in range(60):
        scene = transfer.transfer_scene(index)
        assert scene == transfer.transfer_scene(index)
        shapes |= {t.shape for t in scene.shapes}
        for t in scene.things:
            assert t.w / 2 <= t.x + 1 <= SIZE + 2 - t.w / 2
            assert t.h / 2 <= t.y + 1 <= SIZE + 2 - t.h / 2
        for i, a in enumerate(scene.things):
            for b in scene.things[:i]:
                assert abs(a.x - b.x) >= (a.w + b.w) / 2 - 3 or abs(a.y - b.y) >= (a.h + b.h) / 2 - 3
        assert all(abs(t.w - LARGE) >= 4 for t in scene.shapes)
        assert len({t.color for t in scene.signs}) == len(scene.signs)
    assert shapes == set(SHAPES)


def test_pictures_show_the_colours_of_the_palette() -> None:
    checked = 0
    for index in range(9):
        scene = transfer.transfer_scene(index)
        pixels = np.asarray(transfer.transfer_picture(scene)).astype(int)
        assert pixels.shape == (SIZE, SIZE, 3)
        palette = transfer.PALETTES[index % 3]
        for t in scene.shapes:
            if t.number is None:
                code = palette[t.color]
                wanted = [int(code[i : i + 2], 16) for i in (1, 3, 5)]
                assert np.abs(pixels[int(t.y), int(t.x)] - wanted).max() <= 2
                checked += 1
    assert checked > 20


def test_palettes_name_every_colour_and_typefaces_are_no_others() -> None:
    assert all(set(palette) == set(COLORS) for palette in transfer.PALETTES)
    world = {path.stem for styles in (*SEEN, *UNSEEN) for path in styles}
    assert not world & set(transfer.TYPEFACES)


@pytest.mark.parametrize("shape", [*SHAPES, "octagon"])
def test_shapes_cover_a_fair_share_of_their_square(shape: str) -> None:
    at = np.linspace(-1.2, 1.2, 121)
    covered = transfer.inside(shape, *np.meshgrid(at, at))
    share = covered.mean() * 2.4**2 / 4
    assert 0.25 < share <= 1.0
    assert covered[60, 60]
    assert not covered[0].any()


def test_rows_are_the_questions_with_their_pictures() -> None:
    rows = list(transfer.transfer_rows(3))
    scene, asked = transfer.transfer_questions(0)
    assert [row.prompt for row in rows[:2]] == [q.prompt for q in asked]
    assert rows[0].open().tobytes() == transfer.transfer_picture(scene).tobytes()
    assert len({row.source for row in rows}) == 2


def test_a_moved_picture_is_the_same_picture_elsewhere() -> None:
    scene = make_scene("val", 0)
    still, gone = np.asarray(render(scene)), np.asarray(moved(scene, 3, 5))
    np.testing.assert_array_equal(gone[5:, 3:], still[:-5, :-3])
    np.testing.assert_array_equal(gone[:5, 3:], np.broadcast_to(still[:1, :-3], (5, SIZE - 3, 3)))
