"""Matching: which tokens are alike enough to become one."""

import torch
from torch import Tensor

from lit_reduce.ops.similarity import cosine


def bipartite(metric: Tensor, r: int, penalty: Tensor | None = None) -> Tensor:
    """Bipartite soft matching: the ``r`` tokens of the one half that are most like one of the other half go into it.

    The halves alternate, tokens 0, 2, 4, ... against 1, 3, 5, ...; every token of the first half proposes the most
    similar one of the second. Of equal similarities the lower index wins. ToMe (arXiv 2210.09461), section 3.

    Args:
        metric: ``[B, N, D]``, compared by cosine in float32.
        r: At most half of N.
        penalty: ``[B, N]`` taken off the similarity of a token that proposes: Turbo (arXiv 2407.11717). None for none.

    Returns:
        ``[B, N]`` int64, for each token the one that it goes into: itself, but for ``r``.
    """
    count = metric.shape[1]
    if not 0 <= r <= count // 2:
        raise ValueError(f"{r} of {count} tokens cannot go into the other half")
    best, choice = cosine(metric[:, ::2], metric[:, 1::2]).max(-1)
    best = best if penalty is None else best - penalty[:, ::2]
    order = best.sort(dim=-1, descending=True, stable=True).indices[:, :r]
    into = torch.arange(count, device=metric.device).expand(len(metric), -1)
    return into.scatter(1, 2 * order, 2 * choice.gather(1, order) + 1)
