"""Resampling against torch's own interpolation and a cosine transform written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reduce.ops.cells import cells, lattice
from lit_reduce.ops.resample import resample, resample_weights


@pytest.mark.parametrize(
    ("k", "size"), [(192, (12, 16)), (144, (12, 12)), (128, (8, 16)), (64, (8, 8)), (576, (24, 24))]
)
def test_tent_is_bilinear_resizing_with_antialiasing(k, size):
    x = torch.randn(2, 576, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = resample(x, resample_weights((1, 24, 24), 576, k, "tent"))
    image = x.transpose(1, 2).view(2, 3, 24, 24)
    expected = torch.nn.functional.interpolate(image, size=size, mode="bilinear", antialias=True)
    torch.testing.assert_close(got, expected.flatten(2).transpose(1, 2))


def transform(row: list[float]) -> list[float]:
    """Orthonormal DCT-II."""
    n = len(row)
    return [
        math.sqrt((2 if u else 1) / n) * math.fsum(x * math.cos(math.pi * (i + 0.5) * u / n) for i, x in enumerate(row))
        for u in range(n)
    ]


def inverse(row: list[float]) -> list[float]:
    n = len(row)
    return [
        math.fsum(math.sqrt((2 if u else 1) / n) * x * math.cos(math.pi * (i + 0.5) * u / n) for u, x in enumerate(row))
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("grid", "k", "size"), [((1, 6, 8), 12, (3, 4)), ((1, 6, 6), 9, (3, 3)), ((1, 8, 8), 32, (4, 8))]
)
def test_cosine_is_the_cut_transform_read_at_fewer_points(grid, k, size):
    _, rows, columns = grid
    assert [point[1:] for point in lattice(grid, rows * columns, k)][-1] == tuple((n - 1, n) for n in size)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spectrum = [transform(row) for row in x.tolist()]
    spectrum = [transform(list(column)) for column in zip(*spectrum, strict=True)]  # [columns][rows]
    kept = [inverse(column[: size[0]]) for column in spectrum[: size[1]]]
    made = torch.tensor([inverse(list(row)) for row in zip(*kept, strict=True)])
    scale = math.sqrt(size[0] * size[1] / (rows * columns))
    weights = resample_weights(grid, rows * columns, k, "cosine")
    torch.testing.assert_close(
        resample(x.view(1, -1, 1), weights).view(size), made.double() * scale, atol=1e-6, rtol=1e-6
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0, 3]),
    st.sampled_from(["tent", "cosine"]),
    st.data(),
)
def test_any_count_of_any_grid_keeps_constants_and_the_order_of_cells(frames, rows, columns, extra, kernel, data):
    grid, count = (frames, rows, columns), frames * rows * columns + extra
    k = data.draw(st.integers(1, count))
    weights = resample_weights(grid, count, k, kernel)
    assert weights.shape == (k, count)
    torch.testing.assert_close(weights.sum(1), torch.ones(k, dtype=torch.float64))
    _, assignment = cells(grid, count, k)
    # A cell reads its own tokens more than an even share of them.
    for cell in range(k):
        mine = assignment == cell
        assert weights[cell, mine].sum() >= mine.sum() / count - 1e-6


def test_frames_do_not_mix_while_each_has_points():
    weights = resample_weights((2, 3, 3), 18, 8, "cosine").view(2, 4, 2, 9)
    assert weights[0, :, 1].abs().max() == 0
    assert weights[1, :, 0].abs().max() == 0


def test_resample_keeps_dtype():
    weights = resample_weights((1, 2, 2), 4, 1, "tent")
    assert resample(torch.ones(1, 4, 2, dtype=torch.bfloat16), weights).dtype == torch.bfloat16
