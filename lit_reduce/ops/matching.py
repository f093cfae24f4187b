"""Bipartite matching of similar tokens."""

import torch
from torch import Tensor

from lit_reduce.ops.similarity import cosine


def bipartite(metric: Tensor, r: int, penalty: Tensor | None = None) -> Tensor:
    """Bipartite soft matching: merge the ``r`` most similar tokens at even positions into tokens at odd positions.

    Every token at an even position proposes the most similar token at an odd position; the ``r`` best proposals are
    merged. Among equal similarities the lower index wins.

    Args:
        metric: ``[B, N, D]``, compared by cosine in float32.
        r: At most half of N.
        penalty: ``[B, N]``, subtracted from the similarity of a proposing token (Turbo, arXiv 2407.11717); None for
            none.

    Returns:
        ``[B, N]`` int64, for each token the index of the token it is merged into; itself if it stays.

    Source: ToMe, arXiv 2210.09461, section 3.
    """
    count = metric.shape[1]
    if not 0 <= r <= count // 2:
        raise ValueError(f"{r} of {count} tokens cannot go into the other half")
    best, choice = cosine(metric[:, ::2], metric[:, 1::2]).max(-1)
    best = best if penalty is None else best - penalty[:, ::2]
    order = best.sort(dim=-1, descending=True, stable=True).indices[:, :r]
    into = torch.arange(count, device=metric.device).expand(len(metric), -1)
    return into.scatter(1, 2 * order, 2 * choice.gather(1, order) + 1)
