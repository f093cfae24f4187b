"""Scorers: importance of each visual token. All return ``[B, N]`` unless stated otherwise; higher is kept."""

import torch
from torch import Tensor

from lit_reduce.ops.similarity import cosine, to_float32


def text_relevance(features: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Mean cosine of each visual token with the tokens of the prompt.

    CDPruner (arXiv 2506.10967) averages cosines with CLIP text embeddings; the use of prompt tokens in the space of the
    language model is our adaptation.

    Args:
        features: ``[B, N, D]``.
        text: ``[B, T, D]``.
        mask: ``[B, T]``, true at real prompt tokens; a prompt without any gives 0.
    """
    similarity = cosine(features, text).masked_fill(~mask.bool()[:, None], 0)
    return similarity.sum(-1) / mask.sum(-1, keepdim=True).clamp_min(1)


def text_coverage(features: Tensor, text: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """How well each visual token covers each prompt token ``[B, T, N]``: a softmax over the visual tokens.

    Rows sum to 1 / (number of real prompt tokens); padded rows are zero.

    Args:
        features: ``[B, N, D]``.
        text: ``[B, T, D]``.
        mask: ``[B, T]``.
        temperature: Divides the cosines.

    Source: cross-modal table of MMTok, arXiv 2508.18264.
    """
    real = mask.bool()
    rows = (cosine(text, features) / temperature).softmax(-1)
    return rows.masked_fill(~real[..., None], 0) / real.sum(-1).clamp_min(1)[:, None, None]


def key_norm(keys: Tensor) -> Tensor:
    """L1 norm of each key ``[B, N, D]``; DART (arXiv 2502.11494) selects pivots by it."""
    return to_float32(keys).abs().sum(-1)


def single_head_attention(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of one query over the tokens with all heads taken as one (LLaVA-PruMerge, arXiv 2403.15388).

    Args:
        query: ``[B, D]``.
        keys: ``[B, N, D]``.
    """
    logits: Tensor = (to_float32(keys) @ to_float32(query)[..., None])[..., 0] * keys.shape[-1] ** -0.5
    return logits.softmax(-1)


def information_flow(attention: Tensor, values: Tensor, reader: Tensor, heads: int = 1) -> Tensor:
    """Information flow into the reading token (CLS): ``(relevance + meaning) * size``.

    Relevance is the attention, meaning the unscaled softmax of value products with the reader, the reader itself among
    them, averaged over heads; both are normalised over the tokens. Size is the L1 norm of the mean value over heads.

    Args:
        attention: ``[B, N]``.
        values: ``[B, N, D]``, heads concatenated.
        reader: ``[B, D]``, value of the reading token.
        heads: Number of heads in the values.

    Source: FlowCut, arXiv 2505.19536.
    """
    split, query = to_float32(values).unflatten(-1, (heads, -1)), to_float32(reader).unflatten(-1, (heads, -1))
    products = torch.einsum("bnhd,bhd->bhn", torch.cat([query[:, None], split], 1), query)
    relevance, meaning = to_float32(attention), products.softmax(-1)[..., 1:].mean(1)
    parts = [x / x.sum(-1, keepdim=True).clamp_min(1e-12) for x in (relevance, meaning)]
    score: Tensor = (parts[0] + parts[1]) * split.mean(2).abs().sum(-1)
    return score


def text_raters(rows: Tensor, mask: Tensor) -> Tensor:
    """Prompt tokens that attend to the image more than the average one of those that see it ``[B, T]`` bool.

    Text before the image does not see it, pays it no attention, and does not count. SparseVLM (arXiv 2410.04417)
    selects raters by their embeddings; attention is our substitute.

    Args:
        rows: ``[B, T, N]``, attention of prompt tokens to visual tokens.
        mask: ``[B, T]``, true at real prompt tokens.
    """
    share = to_float32(rows).sum(-1).masked_fill(~mask.bool(), 0)
    return share * (share > 0).sum(-1, keepdim=True) > share.sum(-1, keepdim=True)


def rater_scores(rows: Tensor, who: Tensor) -> Tensor:
    """Mean of the attention rows ``[B, T, N]`` selected by ``who`` ``[B, T]``; of all rows if none is selected."""
    weight = torch.where(who.any(-1, keepdim=True), who, torch.ones_like(who)).to(to_float32(rows).dtype)
    return (to_float32(rows) * weight[..., None]).sum(1) / weight.sum(-1, keepdim=True)
