"""Density peaks against loops in float64."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reduce.ops.clusters import distinctive_tokens, dpc_knn


def draw(seed: int, count: int) -> torch.Tensor:
    return torch.randn(2, count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def peaks_by_loop(x: list[list[float]], clusters: int, neighbours: int) -> tuple[list[int], list[int]]:
    count = len(x)
    far = [[math.dist(a, b) / math.sqrt(len(a)) for b in x] for a in x]
    density = [math.exp(-math.fsum(d * d for d in sorted(row)[:neighbours]) / min(neighbours, count)) for row in far]
    away = []
    for i in range(count):
        denser = [far[i][j] for j in range(count) if (-density[j], j) < (-density[i], i)]
        away.append(min(denser) if denser else max(max(row) for row in far))
    peaks = sorted(sorted(range(count), key=lambda n: -density[n] * away[n])[:clusters])
    return peaks, [min(range(clusters), key=lambda c, n=n: far[n][peaks[c]]) for n in range(count)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 12), st.data())
def test_dpc_knn_matches_the_loop(seed, count, data):
    clusters = data.draw(st.integers(1, count))
    neighbours = data.draw(st.sampled_from([None, 1, 3, 20]))
    x = draw(seed, count)
    peaks, assignment = dpc_knn(x, clusters, neighbours)
    for image in range(2):
        expected = peaks_by_loop(x[image].tolist(), clusters, neighbours or clusters)
        assert (peaks[image].tolist(), assignment[image].tolist()) == expected


def test_dpc_knn_of_equal_tokens_takes_the_first_and_each_peak_itself():
    peaks, assignment = dpc_knn(torch.ones(1, 5, 2), 3)
    assert peaks.tolist() == [[0, 1, 2]]
    assert assignment.tolist() == [[0, 1, 2, 0, 0]]


def test_dpc_knn_finds_two_heaps():
    x = torch.tensor([0.0, 0.1, 0.2, 9.0, 9.1, 9.2])[None, :, None]
    peaks, assignment = dpc_knn(x, 2, neighbours=3)
    assert peaks.tolist() == [[1, 4]]
    assert assignment.tolist() == [[0, 0, 0, 1, 1, 1]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 10), st.data())
def test_distinctive_matches_the_loop(seed, count, data):
    x = draw(seed, count)
    among = torch.rand(2, count, generator=torch.Generator().manual_seed(seed)) < 0.7
    among[:, :3] = True  # of two each is as dense as the other, and rounding would decide
    counts = torch.tensor([data.draw(st.integers(1, int(row.sum()))) for row in among])
    kept_indices, assignment = distinctive_tokens(x, among, counts)
    for image in range(2):
        rows, group = x[image].tolist(), [n for n in range(count) if among[image, n]]

        def alike(a, b, rows=rows):
            return (
                math.fsum(p * q for p, q in zip(rows[a], rows[b], strict=True))
                / math.hypot(*rows[a])
                / math.hypot(*rows[b])
            )

        density = {n: math.fsum(alike(n, m) for m in group) for n in group}
        score = {}
        for n in group:
            better = [alike(n, m) for m in group if density[m] > density[n]]
            score[n] = density[n] * (1 - max(better)) if better else density[n]
        expected = sorted(sorted(group, key=lambda n: -score[n])[: int(counts[image])])
        assert kept_indices[image].nonzero()[:, 0].tolist() == expected
        for n in range(count):
            wanted = -1 if n not in group else n if n in expected else max(expected, key=lambda a, n=n: alike(n, a))
            assert assignment[image, n] == wanted
