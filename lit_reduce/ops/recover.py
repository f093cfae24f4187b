"""Recoverers: from K tokens back to N places, for dense outputs and overlays."""

from torch import Tensor

from lit_reduce.ops.similarity import gather_tokens


def unmerge(features: Tensor, assignment: Tensor, fallback: Tensor | None = None) -> Tensor:
    """Give every original place the token that it went into (ToMe's unmerge, arXiv 2210.09461).

    Args:
        features: ``[B, K, D]``.
        assignment: ``[B, N]``, which of the K tokens, -1 for none.
        fallback: ``[B, N, D]`` for places without a token; zeros when None.

    Returns:
        ``[B, N, D]``.
    """
    full = gather_tokens(features, assignment.clamp_min(0))
    gone = (assignment < 0)[..., None]
    return full.masked_fill(gone, 0) if fallback is None else full.where(~gone, fallback)
