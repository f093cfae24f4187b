"""Gates: exact budgets, gradients against finite differences, and the bias inside a real attention."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reduce.ops.gates import anneal, budget_gap, concrete, exact_budget, key_bias, mix_noise
from lit_reduce.ops.selectors import topk_sorted


def lam_by_loop(scores: list[float], k: int, tau: float) -> list[float]:
    """Plain bisection over a bracket far too wide, in Python floats."""
    low, high = min(scores) - 100 * tau, max(scores) + 100 * tau

    def gates(lam: float) -> list[float]:
        return [0.5 * (1 + math.tanh((score - lam) / (2 * tau))) for score in scores]

    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if math.fsum(gates(middle)) > k else (low, middle)
    return gates(low)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12),
    st.sampled_from([0.05, 0.5, 1.0, 4.0]),
    st.data(),
)
def test_exact_budget_matches_the_loop_and_sums_to_k(row, tau, data):
    k = data.draw(st.integers(1, len(row) - 1))
    gate = exact_budget(torch.tensor([row], dtype=torch.float64), k, tau)
    torch.testing.assert_close(gate[0], torch.tensor(lam_by_loop(row, k, tau), dtype=torch.float64), atol=1e-8, rtol=0)
    assert abs(gate.sum().item() - k) < 1e-8


@pytest.mark.parametrize("k", [1, 64, 288, 575, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_budget_at_real_size(k, dtype):
    scores = torch.randn(3, 576, generator=torch.Generator().manual_seed(k)).to(dtype) * 10
    gate = exact_budget(scores, k, 0.3)
    assert gate.dtype == torch.float32
    assert torch.all((gate >= 0) & (gate <= 1))
    torch.testing.assert_close(gate.sum(-1), torch.full((3,), float(k)), atol=2e-4, rtol=0)


@pytest.mark.parametrize(("k", "tau"), [(1, 1.0), (3, 0.5), (6, 2.0)])
def test_exact_budget_gradient_matches_finite_differences(k, tau):
    scores = torch.randn(2, 7, generator=torch.Generator().manual_seed(k), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (exact_budget(scores, k, tau) * weight).sum().backward()
    step = 1e-6
    for row in range(2):
        for column in range(7):
            ends = []
            for sign in (1, -1):
                moved = scores.detach().clone()
                moved[row, column] += sign * step
                ends.append((exact_budget(moved, k, tau) * weight).sum().item())
            assert scores.grad[row, column].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7)


def test_exact_budget_gradient_survives_saturation_and_keeps_the_dtype():
    scores = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    (exact_budget(scores, 1, 0.01) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert scores.grad.dtype == torch.bfloat16
    assert torch.equal(scores.grad, torch.zeros_like(scores.grad))


def test_exact_budget_moves_no_gate_when_all_scores_shift():
    scores = torch.randn(1, 9, dtype=torch.float64)
    torch.testing.assert_close(exact_budget(scores, 4), exact_budget(scores + 100, 4))


@pytest.mark.parametrize(("k", "tau"), [(0, 1.0), (5, 1.0), (2, 0.0), (2, -1.0)])
def test_exact_budget_refuses_nonsense(k, tau):
    with pytest.raises(ValueError, match=r"k=|tau="):
        exact_budget(torch.zeros(1, 4), k, tau)


def test_key_bias_keeps_as_many_as_the_gates_sum_to():
    scores = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    bias = key_bias(exact_budget(scores, 7))
    kept = [row.nonzero()[:, 0].tolist() for row in bias == 0]
    assert kept == topk_sorted(scores, 7).tolist()
    assert torch.all(bias[bias != 0] == torch.finfo(torch.float32).min)


def test_key_bias_gradient_is_that_of_the_log():
    gate = torch.tensor([[0.8, 0.7, 0.3, 0.2]], requires_grad=True)
    key_bias(gate).backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    torch.testing.assert_close(gate.grad, torch.tensor([[1 / 0.8, 2 / 0.7, 3 / 0.3, 4 / 0.2]]))


def attend(bias: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(1, 1, 6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = bias.double()[:, None, None, :]
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask), (query, key, value)


def test_key_bias_hides_dropped_keys_inside_attention():
    gate = torch.tensor([[0.9, 0.1, 0.9, 0.1, 0.9, 0.1]])
    hidden, (query, key, value) = attend(key_bias(gate))
    gathered = torch.nn.functional.scaled_dot_product_attention(query, key[:, :, ::2], value[:, :, ::2])
    torch.testing.assert_close(hidden, gathered)
    torch.testing.assert_close(attend(key_bias(gate, floor=1e-6))[0], gathered, atol=1e-5, rtol=0)


def test_with_a_floor_dropped_keys_get_the_gradient_of_a_multiplying_gate():
    """The gradient of sum(g e v) / sum(g e) at g = 0 for the dropped keys, by autograd on the plain formula."""
    hard = torch.tensor([[True, False, True, False, True, False]])
    soft = torch.full((1, 6), 0.5, dtype=torch.float64, requires_grad=True)
    hidden, (query, key, value) = attend(key_bias(soft, hard, floor=1e-9))
    hidden.square().sum().backward()

    gate = hard.double().requires_grad_()
    weights = (query @ key.transpose(-1, -2) / 2).exp() * gate[:, None, None, :]
    ((weights @ value) / weights.sum(-1, keepdim=True)).square().sum().backward()
    torch.testing.assert_close(soft.grad, gate.grad, atol=1e-6, rtol=1e-6)
    assert torch.all(soft.grad[~hard].abs() > 1e-3)

    without = torch.full((1, 6), 0.5, dtype=torch.float64, requires_grad=True)
    attend(key_bias(without, hard))[0].square().sum().backward()
    assert torch.all(without.grad[~hard] == 0), "softmax hides them from the gradient too"


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_concrete_gates_open_as_often_as_they_should(tau):
    share = torch.tensor([0.02, 0.3, 0.5, 0.9], dtype=torch.float64)
    uniform = torch.rand(40_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = concrete(share.expand(40_000, 4), uniform, tau)
    bound = 4 * (share * (1 - share) / 40_000).sqrt()
    assert torch.all(((gates > 0.5).double().mean(0) - share).abs() < bound)
    assert torch.equal(gates > 0.5, concrete(share.expand(40_000, 4), uniform, 0.7) > 0.5), "tau decides nothing"
    # The distribution function: m <= x when logit(u) <= tau logit(x) - logit(p).
    for x in (0.1, 0.5, 0.8):
        below = 1 / (1 + math.exp(math.log(0.3 / 0.7) - tau * math.log(x / (1 - x))))
        assert float((gates[:, 1] <= x).double().mean()) == pytest.approx(below, abs=0.01)


def test_concrete_gates_become_hard_and_pass_the_gradient_of_the_formula():
    share = torch.tensor([[0.3, 0.6]], dtype=torch.float64, requires_grad=True)
    uniform = torch.tensor([[0.5, 0.2]], dtype=torch.float64)
    (concrete(share, uniform, 0.5) * torch.tensor([1.0, 2.0])).sum().backward()
    for i, (p, u, weight) in enumerate([(0.3, 0.5, 1.0), (0.6, 0.2, 2.0)]):
        m = 1 / (1 + ((1 - p) * (1 - u) / (p * u)) ** 2)
        assert float(share.grad[0, i]) == pytest.approx(weight * m * (1 - m) / (0.5 * p * (1 - p)), rel=1e-9)
    hard = concrete(share.detach(), uniform, 1e-4)
    torch.testing.assert_close(hard, torch.tensor([[0.0, 0.0]], dtype=torch.float64))
    ends = concrete(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), 0.1)
    torch.testing.assert_close(ends, torch.tensor([[0.0, 1.0]]))
    with pytest.raises(ValueError, match="tau=0"):
        concrete(share, uniform, 0)


def test_softness_falls_by_equal_factors():
    way = [anneal(1.0, 0.1, step / 4) for step in range(5)]
    assert way[0] == 1
    assert way[-1] == pytest.approx(0.1)
    assert all(b / a == pytest.approx(0.1**0.25) for a, b in itertools.pairwise(way))
    assert (anneal(1.0, 0.1, -1), anneal(1.0, 0.1, 7)) == (1.0, pytest.approx(0.1))


def test_the_budget_gap_is_the_spread_of_the_count_in_expectation():
    share = torch.rand(40, generator=torch.Generator().manual_seed(1))
    gates = torch.bernoulli(share.expand(20_000, 40), generator=torch.Generator().manual_seed(2))
    k = float(share.sum())
    assert float(budget_gap(gates, k)) == pytest.approx(float((share * (1 - share)).sum()) / k**2, rel=0.05)
    assert float(budget_gap(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), 2)) == pytest.approx(0.125)


def test_drowning_keeps_the_size_and_loses_the_token():
    generator = torch.Generator().manual_seed(3)
    features = 5 * torch.randn(1, 200, 400, generator=generator, dtype=torch.float64)
    noise = 5 * torch.randn(1, 200, 400, generator=generator, dtype=torch.float64)
    for a in (0.0, 0.3, 1.0):
        made = mix_noise(features, torch.full((1, 200), a), noise)
        assert float(made.square().mean()) == pytest.approx(25, rel=0.03)
        assert float((made * features).mean()) == pytest.approx(25 * math.sqrt(a), abs=0.5)
    gate = torch.tensor([[0.0, 1.0, 0.25]], requires_grad=True)
    x, e = torch.full((1, 3, 1), 2.0), torch.full((1, 3, 1), -1.0)
    mix_noise(x, gate, e).sum().backward()
    assert torch.isfinite(gate.grad).all()
    assert float(gate.grad[0, 2]) == pytest.approx(2 / (2 * 0.5) + 1 / (2 * math.sqrt(0.75)), rel=1e-3)
