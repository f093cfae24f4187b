"""Losses against slow loops in double precision."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_reduce.distill.losses import answer_kl, hinge, listwise, reading, row_mean


def rows(batch: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    guide = torch.rand(batch, count, generator=generator).square()
    return torch.randn(batch, count, generator=generator) * 2, guide / guide.sum(1, keepdim=True)


def test_listwise_equals_a_loop() -> None:
    scores, guide = rows(3, 7)
    guide[0, 2] = 0
    guide[0] /= guide[0].sum()
    total = 0.0
    for s, g in zip(scores.tolist(), guide.double().tolist(), strict=True):
        norm = math.log(sum(math.exp(x) for x in s))
        total += sum(p * (math.log(p) - (x - norm)) for x, p in zip(s, g, strict=True) if p > 0)
    assert float(listwise(scores, guide)) == pytest.approx(total / 3, rel=1e-5)
    assert float(listwise(guide.clamp_min(1e-9).log(), guide)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
@pytest.mark.parametrize("margin", [1.0, 0.3])
def test_hinge_equals_the_best_of_all_subsets(k: int, margin: float) -> None:
    scores, guide = rows(4, 6, seed=k)
    total = 0.0
    for s, g in zip(scores.double().tolist(), guide.tolist(), strict=True):
        right = sorted(range(6), key=lambda j: -g[j])[:k]
        worst = max(
            sum(s[j] + margin * (j not in right) for j in subset) for subset in itertools.combinations(range(6), k)
        )
        total += (worst - sum(s[j] for j in right)) / k
    assert float(hinge(scores, guide, k, margin)) == pytest.approx(total / 4, rel=1e-5, abs=1e-6)


def test_hinge_is_zero_once_the_guides_best_lead_by_the_margin() -> None:
    _, guide = rows(2, 6)
    lead = torch.zeros_like(guide).scatter(1, guide.topk(2, dim=1).indices, 1.01)
    assert float(hinge(lead, guide, 2)) == 0
    assert float(hinge(lead * 0.9, guide, 2)) > 0


def test_reading_equals_a_loop_and_is_zero_at_what_is_read() -> None:
    _, guide = rows(3, 7)
    generator = torch.Generator().manual_seed(1)
    x, made = torch.randn(3, 7, 4, generator=generator) * 3, torch.randn(3, 3, 4, generator=generator)
    owner = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [2, 2, 2, 2, 1, 1, 0], [0, 1, 2, -1, -1, 2, 1]])
    total, read = 0.0, made.double().clone()
    for b in range(3):
        scale = float(x[b].double().square().mean())
        for k in range(3):
            inside = [n for n in range(7) if owner[b, n] == k]
            mass = sum(float(guide[b, n]) for n in inside)
            read[b, k] = sum(float(guide[b, n]) * x[b, n].double() for n in inside) / mass
            total += mass * float((made[b, k].double() - read[b, k]).square().mean()) / scale / 3
    assert float(reading(made, x, owner, guide)) == pytest.approx(total, rel=1e-5)
    assert float(reading(read.float(), x, owner, guide)) < 1e-12
    nothing = torch.zeros_like(guide).scatter(1, owner.eq(0).float().argmax(1, keepdim=True), 1)
    assert reading(made, x, owner, nothing).isfinite()  # regions that nobody looks at


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_answer_kl_of_the_whole_vocabulary_is_the_librarys(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 9, generator=generator) * 2 for _ in range(2))
    top, ids = teacher.log_softmax(-1).topk(9)
    soft = [(x / temperature).log_softmax(-1).double() for x in (student, teacher)]
    expected = F.kl_div(soft[0], soft[1], reduction="none", log_target=True).sum(-1) * temperature**2
    found = answer_kl(student, top, ids, temperature)
    # The empty bucket of the rest has a floor of 1e-6, which a temperature lifts.
    torch.testing.assert_close(found.double(), expected, rtol=1e-3 if temperature > 1 else 1e-5, atol=2e-5)


def test_answer_kl_puts_the_rest_into_one_bucket() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 9, generator=generator) * 2 for _ in range(2))
    top, ids = teacher.log_softmax(-1).topk(3)
    for a, found in enumerate(answer_kl(student, top, ids).tolist()):
        p, q = (x[a].double().softmax(-1).tolist() for x in (teacher, student))
        chosen = ids[a].tolist()
        pairs = [(p[i], q[i]) for i in chosen]
        pairs.append((1 - sum(p[i] for i in chosen), 1 - sum(q[i] for i in chosen)))
        assert found == pytest.approx(sum(x * math.log(x / y) for x, y in pairs), rel=1e-4)
    assert float(answer_kl(teacher, top, ids).abs().max()) < 1e-5


def test_answer_kl_has_a_finite_gradient_even_when_one_word_is_certain() -> None:
    student = torch.zeros(1, 5, requires_grad=True)
    top = torch.tensor([[0.0, -30.0]])
    answer_kl(student, top, torch.tensor([[3, 1]])).sum().backward()
    assert student.grad.isfinite().all()
    assert student.grad.argmin() == 3


def test_row_mean_weighs_rows_equally() -> None:
    values = torch.tensor([1.0, 3.0, 10.0, 4.0, 4.0, 7.0])
    where = torch.tensor([0, 0, 1, 2, 2, 2])
    assert float(row_mean(values, where, 3)) == pytest.approx((2 + 10 + 5) / 3)
    halves = [row_mean(values[:3], where[:3], 2), row_mean(values[3:], where[3:] - 2, 1)]
    assert float(2 * halves[0] + halves[1]) / 3 == pytest.approx((2 + 10 + 5) / 3)
