"""Attention over separate sets of keys, and attention within groups of tokens."""

import torch
from torch import Tensor

from lit_reduce.ops.similarity import to_float32

HIDDEN = -1e30  # logit of a hidden key: finite, so that a query without any visible key has gradients


def attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention that also returns the log-sum-exp of the logits.

    Args:
        queries: ``[B, H, R, d]``.
        keys: ``[B, G, M, d]`` for G groups of heads (grouped-query attention).
        values: ``[B, G, M, d]``.
        seen: ``[B, R, M]`` bool, true where a query may attend to a key.
        scaling: Factor on dot products.

    Returns:
        Output ``[B, R, H, d]`` and log-sum-exp ``[B, H, R]``. For a query without any visible key the output is
        undefined and the log-sum-exp is about `HIDDEN`.
    """
    batch, heads, rows, width = queries.shape
    groups, many = keys.shape[1:3]
    queries, keys, values = to_float32(queries), to_float32(keys), to_float32(values)
    logits = queries.reshape(batch, groups, -1, width) @ keys.transpose(2, 3) * scaling
    logits = logits.view(batch, heads, rows, many).masked_fill(~seen[:, None], HIDDEN)
    weights = logits.softmax(-1).view(batch, groups, -1, many)
    answer = (weights @ values).view(batch, heads, rows, -1).transpose(1, 2)
    return answer, logits.logsumexp(-1)


def join_softmax(answer: Tensor, mass: Tensor, more: Tensor, more_mass: Tensor, gate: Tensor) -> Tensor:
    """Merge two attention outputs: ``lerp(answer, softmax over both key sets, gate)``.

    With a gate of 0 the result equals ``answer`` to the bit.

    Args:
        answer: ``[B, R, H, d]``, attention output over the first set of keys.
        mass: ``[B, H, R]``, its log-sum-exp.
        more: ``[B, R, H, d]``, attention output over the second set.
        more_mass: ``[B, H, R]``, its log-sum-exp.
        gate: Scalar tensor.
    """
    share = torch.sigmoid(more_mass - mass).transpose(1, 2)[..., None]
    return answer + gate * share * (more - answer)


def grouped_attention(logits: Tensor, values: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Softmax over the tokens of each group, and the weighted mean of their values.

    Args:
        logits: ``[B, N, H]``.
        values: ``[B, N, H, d]``.
        assignment: ``[B, N]``, the group of each token, below ``k``; -1 for none.
        k: Number of groups.

    Returns:
        ``[B, k, H, d]``; zero for groups without tokens.
    """
    batch, _, heads = logits.shape
    index = assignment.clamp_min(0)[..., None].expand_as(logits)
    logits = logits.masked_fill((assignment < 0)[..., None], HIDDEN)
    top = logits.detach().new_full((batch, k, heads), HIDDEN).scatter_reduce(1, index, logits.detach(), "amax")
    weight = (logits - top.gather(1, index)).exp() * (assignment >= 0)[..., None]
    total = torch.zeros_like(top).scatter_add(1, index, weight).clamp_min(1e-30)
    share = (weight / total.gather(1, index))[..., None] * values
    wide = index[..., None].expand_as(share)
    return values.new_zeros(batch, k, *values.shape[2:]).scatter_add(1, wide, share)
