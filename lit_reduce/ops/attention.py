"""Attention to keys beside a layer's own: read by themselves, then join_softmax as if there had been one softmax."""

import torch
from torch import Tensor

from lit_reduce.ops.similarity import to_float32

HIDDEN = -1e30  # logit of a key that is not seen: finite, so that a query without any key has gradients


def attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """What queries read of some keys.

    Args:
        queries: ``[B, H, R, d]``.
        keys: ``[B, G, M, d]`` of G groups of heads.
        values: ``[B, G, M, d]``.
        seen: ``[B, R, M]``, which keys each query sees.
        scaling: Factor on dot products.

    Returns:
        ``[B, R, H, d]`` and the log-sum-exp of the logits ``[B, H, R]``; both mean nothing where no key is seen, and
        then the latter is about `HIDDEN`.
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
    """``lerp(answer, one softmax over both sets of keys, gate)``; a gate of 0 leaves ``answer`` as it is, to the bit.

    Args:
        answer: ``[B, R, H, d]``, what was read of the first keys.
        mass: ``[B, H, R]``, their log-sum-exp.
        more: As ``answer``, of the others.
        more_mass: As ``mass``.
        gate: A number.
    """
    share = torch.sigmoid(more_mass - mass).transpose(1, 2)[..., None]
    return answer + gate * share * (more - answer)


def grouped_attention(logits: Tensor, values: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Softmax of tokens within the group that each belongs to, and the groups' means of values by it.

    Args:
        logits: ``[B, N, H]``.
        values: ``[B, N, H, d]``.
        assignment: ``[B, N]`` below ``k``; -1 for none.
        k: Groups.

    Returns:
        ``[B, k, H, d]``; zero for groups without members.
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
