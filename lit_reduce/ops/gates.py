"""Differentiable relaxations of the choice of K tokens.

`exact_budget` gives soft gates with a fixed sum, `concrete` random gates with a given mean, `mix_noise` replaces tokens
by noise as their gate closes, and `key_bias` turns gates into an attention mask with a gradient.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def exact_budget(scores: Tensor, k: int, tau: float = 1.0) -> Tensor:
    """Soft gates that sum to exactly ``k``: ``m_j = sigmoid((s_j - lam) / tau)``, with ``lam`` found by bisection.

    Every row meets its budget, so no loss on the ratio is needed. The gradient accounts for the dependence of ``lam``
    on the scores: with ``a_j = m_j (1 - m_j)``, ``dL/ds_j = a_j / tau * (g_j - sum(g a) / sum(a))``. This is our
    relaxation of top-k, by implicit differentiation of ``sum(m) = k``.

    Args:
        scores: ``[B, N]``, finite.
        k: Between 1 and N.
        tau: Temperature; the gates approach 0 and 1 as it goes to 0.

    Returns:
        ``[B, N]`` in float32 (float64 for float64 scores), each row sums to ``k``.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k={k} is not between 1 and {scores.shape[-1]}")
    if tau <= 0:
        raise ValueError(f"tau={tau} is not positive")
    gates: Tensor = _ExactBudget.apply(scores, k, tau)
    return gates


class _ExactBudget(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: int, tau: float) -> Tensor:
        scores64 = scores.double()
        count = scores.shape[-1]
        if k == count:
            gates = torch.ones_like(scores64)
        else:
            # At the ends of this bracket all gates, and so their mean, are on one side of k / N.
            shift = tau * math.log(k / (count - k))
            low = scores64.amin(-1, keepdim=True) - shift
            high = scores64.amax(-1, keepdim=True) - shift
            for _ in range(45):  # to 1e-13 of the range of scores; no early stop, which would wait for the device
                middle = (low + high) / 2
                too_many = torch.sigmoid((scores64 - middle) / tau).sum(-1, keepdim=True) > k
                low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
            gates = torch.sigmoid((scores64 - (low + high) / 2) / tau)
        ctx.save_for_backward(gates)
        ctx.tau, ctx.dtype = tau, scores.dtype
        return gates.to(torch.promote_types(scores.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gates,) = ctx.saved_tensors
        slope = gates * (1 - gates)
        # If all gates are saturated the gradient is 0, not 0 / 0.
        total = slope.sum(-1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
        mean = (grad * slope).sum(-1, keepdim=True) / total
        return (slope / ctx.tau * (grad - mean)).to(ctx.dtype), None, None


def key_bias(gate: Tensor, hard: Tensor | None = None, floor: float = 0.0) -> Tensor:
    """Additive attention bias of visual keys: 0 for kept keys, hidden for dropped ones, with a gradient to the gates.

    The forward pass is hard. With ``floor=0`` a dropped key gets the lowest finite number and the gradient is that of
    ``log(gate)``; as softmax passes no gradient to a key of probability zero, only kept keys learn. With a small
    ``floor`` (1e-6) a dropped key gets ``log(floor)`` and the gradient is divided by ``floor``. Together these give the
    straight-through gradient of a gate that multiplies the attention weights, so that a dropped token can be selected
    again later in training.

    Args:
        gate: ``[B, N]`` soft gates in (0, 1).
        hard: ``[B, N]`` bool, the kept keys; None keeps the largest gates, as many as the gates of the row sum to.
        floor: Weight of a dropped key in the backward pass, 0 for none.

    Returns:
        ``[B, N]`` in the dtype of the gates.
    """
    if hard is None:
        order = gate.detach().sort(dim=-1, descending=True, stable=True).indices
        wanted = gate.detach().double().sum(-1, keepdim=True).round()
        ranks = torch.arange(gate.shape[-1], device=gate.device).expand_as(gate)
        hard = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, order, ranks < wanted)
    bias: Tensor = _KeyBias.apply(gate, hard.bool(), floor)
    return bias


class _KeyBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, hard: Tensor, floor: float) -> Tensor:
        lowest = torch.finfo(gate.dtype).min if floor == 0 else math.log(floor)
        if floor == 0:
            ctx.save_for_backward(gate.clamp_min(1e-6))
        else:
            ctx.save_for_backward(hard.to(gate.dtype).clamp_min(floor))
        return torch.zeros_like(gate).masked_fill(~hard, lowest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (divisor,) = ctx.saved_tensors
        return grad / divisor, None, None


def concrete(open_share: Tensor, uniform: Tensor, tau: float) -> Tensor:
    """Binary concrete gates: ``sigmoid((logit(p) + logit(u)) / tau)``, above one half with probability ``p``.

    ``logit(u)`` of a uniform ``u`` is the difference of two Gumbel variables. The sign of the sum is therefore an exact
    sample of Bernoulli(p) for any ``tau``; the gates approach 0 and 1 as ``tau`` goes to 0.

    Args:
        open_share: ``[B, N]`` probabilities ``p``.
        uniform: ``[B, N]`` in (0, 1).
        tau: Temperature, above 0.

    Source: binary concrete distribution, arXiv 1611.00712 and 1611.01144.
    """
    if tau <= 0:
        raise ValueError(f"tau={tau} is not positive")
    share = open_share.clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid((share.logit() + uniform.to(share).logit()) / tau)


def anneal(first: float, last: float, share: float) -> float:
    """Geometric interpolation from ``first`` to ``last``, both positive, at ``share`` in [0, 1]."""
    return float(first * (last / first) ** min(1.0, max(0.0, share)))


def budget_gap(gates: Tensor, k: int) -> Tensor:
    """Budget loss ``(sum(m) / k - 1)^2``, averaged over rows of gates ``[B, N]``."""
    return (gates.sum(-1) / k - 1).square().mean()


def mix_noise(features: Tensor, gate: Tensor, noise: Tensor, least: float = 1e-4) -> Tensor:
    """Variance-preserving noise gate: ``sqrt(a) x + sqrt(1 - a) e``.

    A closed gate replaces the token by noise. If the noise has the mean square of the tokens, so has the result, and
    the model reads values of the scale it was trained on.

    Args:
        features: ``[B, N, D]``.
        gate: ``[B, N]`` in [0, 1].
        noise: ``[B, N, D]``, of mean 0.
        least: Distance that gates keep from 0 and 1, where the square root has an infinite slope.

    Source: AutoSelect, arXiv 2603.07135.
    """
    a = (least + (1 - 2 * least) * gate)[..., None].to(features)
    return a.sqrt() * features + (1 - a).sqrt() * noise
