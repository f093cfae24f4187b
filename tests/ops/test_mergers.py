"""Average pooling against a loop in float64, and against torch where torch does the same."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reduce.ops.cells import cells
from lit_reduce.ops.mergers import average_pool


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_average_pool_matches_the_loop(rows, columns, data):
    k = data.draw(st.integers(1, rows * columns))
    features = torch.randn(2, rows * columns, 3, generator=torch.Generator().manual_seed(k))
    pooled, anchors, owner = average_pool(features, (1, rows, columns), k)
    expected = torch.zeros(2, k, 3, dtype=torch.float64)
    for image in range(2):
        for cell in range(k):
            members = [n for n in range(rows * columns) if owner[n] == cell]
            for width in range(3):
                expected[image, cell, width] = sum(float(features[image, n, width]) for n in members) / len(members)
    torch.testing.assert_close(pooled.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(anchors, cells((1, rows, columns), rows * columns, k)[0])


def test_average_pool_is_adaptive_pooling_where_the_sizes_divide():
    features = torch.randn(2, 576, 4, generator=torch.Generator().manual_seed(0))
    pooled, _, _ = average_pool(features, (1, 24, 24), 64)
    image = features.transpose(1, 2).view(2, 4, 24, 24)
    expected = torch.nn.functional.adaptive_avg_pool2d(image, 8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled, expected)


def test_average_pool_keeps_dtype_and_sums_in_float32():
    features = torch.ones(1, 576, 1, dtype=torch.bfloat16)
    features[:, ::2] = 1.0078125
    pooled, _, _ = average_pool(features, (1, 24, 24), 1)
    assert pooled.dtype == torch.bfloat16
    # A running bfloat16 sum would stick at 256 and give 0.44.
    assert abs(pooled.item() - 1.0039) < 0.005


def test_average_pool_passes_gradients():
    features = torch.randn(1, 12, 2, requires_grad=True)
    average_pool(features, (1, 3, 4), 4)[0].sum().backward()
    assert torch.all(features.grad > 0)
