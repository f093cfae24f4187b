"""Thresholds: spatial scores by loop, effective_share that ignores what is gone, counts that spend a budget exactly."""

import itertools

import pytest
import torch

from lit_reduce.errors import UserError
from lit_reduce.ops.budgets import geometric_schedule_for_mean
from lit_reduce.ops.thresholds import (
    effective_share,
    feasible_count,
    grid_scores,
    mass_threshold,
    max_normalize,
    ragged_topk,
)


@pytest.mark.parametrize("grid", [(1, 24, 24), (2, 5, 7)])
def test_the_sparser_the_grid_the_higher_its_score(grid):
    frames, rows, columns = grid
    count = frames * rows * columns + 3  # newline tokens behind
    score = grid_scores(torch.arange(count)[None], grid)[0].tolist()
    for n in range(count):
        row, column = n // columns % rows, n % columns
        on = [s for s in (2, 3, 4, 6) if row % s == s // 2 and column % s == s // 2]
        expected = max((1 - 3 / s**2 for s in on), default=0) if n < count - 3 else 0
        assert score[n] == pytest.approx(expected)
    if grid == (1, 24, 24):
        assert sum(x > 0.9 for x in score) == 16
        assert (
            sum(x > 0.8 for x in score) == 36 + 16 - sum(r % 6 == 3 and r % 4 == 2 for r in range(24)) ** 2
        )  # stride 4 and stride 6


def test_the_places_of_survivors_decide_not_their_order():
    whole = grid_scores(torch.arange(36)[None], (1, 6, 6))
    left = torch.tensor([[3, 14, 21, 35]])
    assert torch.equal(grid_scores(left, (1, 6, 6)), whole[:, left[0]])


def test_scores_rest_on_as_many_tokens_as_share_them():
    even = torch.tensor([[0.2, 0.2, 0.2, 0.0], [0.7, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]])
    assert effective_share(even, torch.ones(3, 4)).tolist() == pytest.approx([0.75, 0.25, 1.0])
    gone = effective_share(even, torch.tensor([[1.0, 1.0, 0.0, 1.0]]).expand(3, -1))
    assert gone.tolist() == pytest.approx([2 / 3, 1 / 3, 1.0])
    assert effective_share(torch.zeros(1, 4), torch.ones(1, 4)).isfinite().all()


def test_so_much_mass_lies_above_a_threshold():
    scores = torch.tensor([[3.0, 1.0, 4.0, 2.0]]).requires_grad_()
    ones = torch.ones(1, 4)
    for count, expected in ((1, 3.5), (2, 2.5), (3, 1.5), (2.5, 2.0), (4, 0.0), (9, 0.0), (0, 4.0)):
        assert float(mass_threshold(scores, ones, torch.tensor([float(count)])).detach()) == pytest.approx(expected)
    weight = torch.tensor([[0.5, 1.0, 0.0, 1.0]])  # the largest is gone
    assert float(mass_threshold(scores, weight, torch.tensor([0.5])).detach()) == pytest.approx(2.5)
    mass = torch.tensor([2.5], requires_grad=True)
    mass_threshold(scores, ones, mass).sum().backward()
    assert float(mass.grad) == pytest.approx(-1.0)
    assert scores.grad.tolist() == [[0.25, 0.25, 0.0, 0.5]]


def test_peaked_is_a_part_of_the_largest_and_of_nothing_nothing():
    assert max_normalize(torch.tensor([[1.0, 4.0, 2.0], [0.0, 0.0, 0.0]])).tolist() == [[0.25, 1, 0.5], [0, 0, 0]]


def test_best_keeps_the_largest_margins_of_each_row():
    margin = torch.tensor([[0.1, 0.9, -1.0, 0.9], [3.0, 2.0, 1.0, 0.0]])
    kept_indices, valid = ragged_topk(margin, torch.tensor([2, 3]))
    assert [row[real].tolist() for row, real in zip(kept_indices, valid, strict=True)] == [[1, 3], [0, 1, 2]]
    assert valid.tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_affordable_spends_the_budget_whatever_is_wanted(seed):
    generator = torch.Generator().manual_seed(seed)
    depth, tokens = 12, 100
    cuts = sorted({int(x) for x in torch.randint(0, depth, (3,), generator=generator)})
    keep = int(torch.randint(-(-(tokens * cuts[0] + depth - cuts[0]) // depth), tokens, (1,), generator=generator))
    spent, now = float(tokens * cuts[0]), tokens
    for i, layer in enumerate(cuts):
        after = cuts[i + 1] if i + 1 < len(cuts) else depth
        wanted = torch.randint(0, tokens, (1,), generator=generator)
        count = min(
            now, int(feasible_count(wanted, torch.tensor([keep * depth - spent]), after - layer, depth - after))
        )
        assert 1 <= count <= now
        now, spent = count, spent + count * (after - layer)
    assert keep * depth - (depth - cuts[-1]) < spent <= keep * depth


@pytest.mark.parametrize(("depth", "keep"), [(32, 144), (32, 576), (6, 192), (6, 128), (12, 150)])
def test_a_falling_schedule_meets_its_mean(depth, keep):
    stages = geometric_schedule_for_mean([0.125, 0.4375, 0.75], depth, 576, keep)
    assert list(stages) == {32: [4, 14, 24], 6: [1, 3, 4], 12: [2, 5, 9]}[depth]
    counts = [576, *stages.values()]
    ends = [*stages, depth]
    seen = ends[0] * 576 + sum(count * (ends[i + 1] - ends[i]) for i, count in enumerate(counts[1:]))
    assert seen / depth == pytest.approx(keep, abs=0.5)
    parts = [b / a for a, b in itertools.pairwise(counts)]
    assert max(parts) - min(parts) < 0.1


def test_a_budget_below_what_the_first_layers_see_is_refused():
    assert geometric_schedule_for_mean([0.0, 0.5], 6, 576, 1) == {0: 1, 3: 1}
    with pytest.raises(UserError, match="the mean over 6 layers is 97 or more"):
        geometric_schedule_for_mean([0.125, 0.5], 6, 576, 64)
