"""Draws: functions of seed, step and question; evenly, by weights, and on their way down."""

import math

import pytest
import torch

from lit_reduce.distill.seeded_sampling import budget_of, lowered, normal, uniform


def test_budgets_are_spread_evenly_on_a_log_scale_and_repeat() -> None:
    drawn = [budget_of(step, 0, [192, 16, 64]) for step in range(800)]
    assert drawn == [budget_of(step, 0, [16, 192]) for step in range(800)]
    assert drawn != [budget_of(step, 1, [16, 192]) for step in range(800)]
    assert 16 <= min(drawn) <= 17 < 186 <= max(drawn) <= 192
    middle = sum(k < (16 * 192) ** 0.5 for k in drawn)
    assert abs(middle - 400) < 60
    assert {budget_of(step, 0, [32]) for step in range(20)} == {32}


def test_weighted_budgets_come_as_often_as_they_should() -> None:
    drawn = [budget_of(step, 0, [64, 144, 256], [2, 3, 5]) for step in range(2000)]
    for budget, share in ((64, 0.2), (144, 0.3), (256, 0.5)):
        assert drawn.count(budget) / 2000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 2000))
    assert drawn == [budget_of(step, 0, [64, 144, 256], [0.2, 0.3, 0.5]) for step in range(2000)]


def test_the_curriculum_comes_down_from_all_tokens_and_then_leaves_budgets_alone() -> None:
    way = [budget_of(step, 0, [32], None, (step + 1) / 10, 576) for step in range(12)]
    expected = [round(576 * (32 / 576) ** (step / 10)) for step in range(1, 11)]
    assert way == [*expected, 32, 32]
    assert lowered(32, 0.0, 576) == 576
    assert lowered(32, 0.3, 20) == 32  # a budget above all tokens is someone else's to cut
    plain = [budget_of(step, 3, [16, 192]) for step in range(50)]
    assert [budget_of(step, 3, [16, 192], None, 1.0, 576) for step in range(50)] == plain
    halfway = [budget_of(step, 3, [16, 192], None, 0.5, 576) for step in range(50)]
    assert all(a > b for a, b in zip(halfway, plain, strict=True))


def test_noise_belongs_to_the_question() -> None:
    questions = torch.tensor([0, 5, 3])
    for draw in (lambda q, seed=0, step=7: uniform(seed, step, q, 400), lambda q, s=0, t=7: normal(s, t, q, 20, 20)):
        whole = draw(questions)
        assert torch.equal(draw(questions[1:]), whole[1:])
        assert torch.equal(draw(questions), whole)
        assert not torch.equal(whole[0], whole[1])
        assert not torch.equal(draw(questions, 1), whole)
        assert not torch.equal(draw(questions, 0, 8), whole)
    many, wide = uniform(0, 0, torch.arange(50), 400), normal(0, 0, torch.arange(50), 20, 20)
    assert 0 < float(many.min()) < 1e-3
    assert 1 - 1e-3 < float(many.max()) < 1
    assert float(many.mean()) == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / many.numel()))
    assert float(wide.mean()) == pytest.approx(0, abs=4 / math.sqrt(wide.numel()))
    assert float(wide.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / wide.numel()))
