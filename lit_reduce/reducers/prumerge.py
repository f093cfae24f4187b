"""LLaVA-PruMerge and PruMerge+: keep outliers of CLS attention and merge similar tokens into them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_reduce.ops.adaptive import outlier_count, ragged_indices
from lit_reduce.ops.mergers import merge_attention
from lit_reduce.ops.scorers import single_head_attention
from lit_reduce.ops.selectors import ranks, true_indices
from lit_reduce.ops.similarity import to_float32
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class PruMergeConfig(ReducerConfig):
    """Settings of `PruMerge` and `PruMergePlus`."""

    neighbours: int = option(32, "tokens that each kept one takes in", min=0)
    adaptive: bool = option(False, "let the picture say how many stay, at most the budget: the paper's rule")


@register
class PruMerge(Reducer):
    """Keeps the tokens with the most CLS attention, each plus its attention-weighted neighbours, and one summary token.

    Attention is that of CLS in the last tower layer with all heads taken as one, over the patches alone (the paper's
    softmax includes CLS). The summary token is the attention-weighted sum of all dropped tokens, at the position of the
    most attended of them. The number of kept tokens in the paper, outliers beyond 1.5 interquartile ranges, differs per
    image; exactly K is our reading, and ``adaptive`` is the paper's. Merging projected tokens instead of tower features
    is our reading too.

    Source: LLaVA-PruMerge, arXiv 2403.15388.
    """

    name = "prumerge"
    kind = "resample"
    signals = frozenset({"cls_query@-1", "keys@-1"})
    paper = "LLaVA-PruMerge, arXiv 2403.15388"
    config_class = PruMergeConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """With ``adaptive`` fewer than K tokens may be valid."""
        x, keys = tokens.features, tokens.signal("keys@-1")
        attention = single_head_attention(tokens.signal("cls_query@-1"), keys)
        chosen = self.choose(attention, keep - 1) if keep > 1 else torch.zeros_like(attention, dtype=torch.bool)
        extra = attention.masked_fill(chosen, -torch.inf).argmax(-1, keepdim=True)
        kept_indices, valid = ragged_indices(chosen.scatter(1, extra, True), keep)
        made = merge_attention(x, keys, attention, kept_indices, self.config.neighbours)
        summary = ((attention * ~chosen)[:, None] @ to_float32(x)).to(x.dtype)
        made = torch.where((kept_indices == extra)[..., None] & valid[..., None], summary, made)
        return Reduction(kept_indices, features=made, valid=valid if self.config.adaptive else None, scores=attention)

    def choose(self, attention: Tensor, k: int) -> Tensor:
        """Tokens that are kept beside the summary ``[B, N]`` bool: ``k``, or with ``adaptive`` 1 to ``k``."""
        count = outlier_count(attention).clamp(1, k)[:, None] if self.config.adaptive else k
        return ranks(attention) < count


@register
class PruMergePlus(PruMerge):
    """PruMerge that also keeps tokens at an even stride.

    A quarter of K by attention, the others evenly spread over the rest: our reading of a fixed count. ``adaptive`` is
    the rule of the paper and the official code: outliers, whose share is p, and every ``int(int(1 / p) / 3)``-th token
    from the first to the last but one, up to K tokens, outliers first. If p is a third or more, where the official code
    fails, all these tokens are candidates.

    Source: LLaVA-PruMerge+, arXiv 2403.15388.
    """

    name = "prumerge_plus"
    paper = "LLaVA-PruMerge+, arXiv 2403.15388"

    def choose(self, attention: Tensor, k: int) -> Tensor:
        """See `PruMerge.choose`."""
        count = attention.shape[1]
        if self.config.adaptive:
            outliers = outlier_count(attention).clamp_min(1)[:, None]
            top = ranks(attention) < outliers
            step = (count // outliers // 3).clamp_min(1)
            index = torch.arange(count, device=attention.device)
            wanted = top | ((index % step == 0) & (index < count - 1))  # the official range ends before the last one
            return ranks(attention + top + wanted) < wanted.sum(-1, keepdim=True).clamp_max(k)
        few = round((k + 1) / 4)
        chosen = ranks(attention) < few
        rest = true_indices(~chosen, count - few)
        spread = (2 * torch.arange(k - few, device=rest.device) + 1) * rest.shape[1] // (2 * max(1, k - few))
        return chosen.scatter(1, rest[:, spread], True)
