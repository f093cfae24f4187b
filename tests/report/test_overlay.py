"""Overlays: bright exactly where tokens stayed."""

import numpy as np
import pytest
from PIL import Image

from lit_reduce.report.overlay import overlay, paint, paintable


def test_kept_cells_are_bright_and_the_rest_is_dim() -> None:
    kept = [0, 5, 6, 11]
    painted = np.asarray(paint(Image.new("RGB", (40, 30), "white"), (1, 3, 4), kept, shortest=300))
    assert painted.shape == (300, 400, 3)
    centres = painted[50::100, 50::100]  # the middle of each of the 3 x 4 cells
    for cell in range(12):
        value = centres[divmod(cell, 4)]
        assert (value == 255).all() if cell in kept else (value < 100).all()


def test_outline_surrounds_a_region_but_does_not_cross_it() -> None:
    painted = np.asarray(paint(Image.new("RGB", (300, 300), "white"), (1, 3, 3), [3, 4], shortest=300))
    assert tuple(painted[101, 50]) != (255, 255, 255)  # above the pair
    assert tuple(painted[150, 198]) != (255, 255, 255)  # right of it
    assert tuple(painted[150, 100]) == (255, 255, 255)  # between the two


def test_a_grid_that_does_not_divide_the_picture_covers_all_of_it() -> None:
    picture = Image.new("RGB", (337, 211), "white")
    painted = np.asarray(paint(picture, (1, 7, 9), range(63), shortest=211))
    inner = painted[4:-4, 4:-4]
    assert painted.shape == (211, 337, 3)
    assert (inner == 255).all()


def test_the_picture_itself_is_untouched_and_nonsense_is_refused() -> None:
    picture = Image.new("RGB", (30, 30), "white")
    paint(picture, (1, 3, 3), [1])
    assert picture.getextrema() == ((255, 255),) * 3
    for grid, kept in [((1, 3, 3), [9]), ((1, 3, 3), [-1]), ((2, 3, 3), [1])]:
        with pytest.raises(ValueError, match="cannot paint"):
            paint(picture, grid, kept)


def test_a_picture_in_crops_is_painted_whole_beside_its_overview() -> None:
    # 2 x 2 of the overview (0 to 3), then rows of three with a newline behind each: 4 5 6 | 7, 8 9 10 | 11.
    painted = np.asarray(overlay(Image.new("RGB", (300, 200), "white"), (1, 2, 3), 12, [1, 6, 7, 8, 11], shortest=200))
    assert painted.shape == (200, 300 + 4 + 300, 3)
    first, whole = painted[:, :300], painted[:, 304:]
    bright = [(first[y, x] == 255).all() for y in (50, 150) for x in (75, 225)]
    assert bright == [False, True, False, False]
    bright = [(whole[y, x] == 255).all() for y in (50, 150) for x in (50, 150, 250)]
    assert bright == [False, False, True, True, False, False]


def test_one_grid_is_painted_alone_and_frames_are_refused() -> None:
    picture = Image.new("RGB", (60, 40), "white")
    alone = overlay(picture, (1, 2, 3), 6, [1, 4], shortest=40)
    assert alone.tobytes() == paint(picture, (1, 2, 3), [1, 4], shortest=40).tobytes()
    assert paintable((1, 2, 3), 6)
    assert not paintable((4, 2, 3), 24)
    with pytest.raises(ValueError, match="cannot paint"):
        overlay(picture, (4, 2, 3), 24, [1])
