"""LLaVA-PruMerge and PruMerge+: outliers of attention stay, and take in what resembles them."""

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
    """The most attended tokens, each plus its neighbours times their attention; one more holds what is dropped.

    Attention is that of CLS in the last tower layer with all heads as one, over the patches alone (the paper's softmax
    has CLS too). The extra token is the attention-weighted sum of all dropped ones, at the place of the first of them.
    The paper's count, outliers beyond 1.5 interquartile ranges, differs from picture to picture; exactly K is our
    reading, and ``adaptive`` the paper's. Merging projected tokens, not the tower's, is our reading too.
    """

    name = "prumerge"
    kind = "resample"
    signals = frozenset({"cls_query@-1", "keys@-1"})
    paper = "LLaVA-PruMerge, arXiv 2403.15388"
    config_class = PruMergeConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """With ``adaptive`` fewer than K may be valid."""
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
        """Tokens that stay beside the extra one ``[B, N]`` bool, ``k`` or with ``adaptive`` fewer, at least 1."""
        count = outlier_count(attention).clamp(1, k)[:, None] if self.config.adaptive else k
        return ranks(attention) < count


@register
class PruMergePlus(PruMerge):
    """PruMerge with tokens at an even stride beside the most attended.

    A quarter of K by attention, the others spread evenly over what is left: our reading of a fixed count. ``adaptive``
    is the paper's: outliers, their share p, and every ``int(int(1 / p) / 3)``-th token, as far as K reaches; outliers
    first. Where the official code stops with an error, for p of a third and more, all tokens are candidates.
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
            wanted = top | (torch.arange(count, device=attention.device) % step == 0)
            return ranks(attention + top + wanted) < wanted.sum(-1, keepdim=True).clamp_max(k)
        few = round((k + 1) / 4)
        chosen = ranks(attention) < few
        rest = true_indices(~chosen, count - few)
        spread = (2 * torch.arange(k - few, device=rest.device) + 1) * rest.shape[1] // (2 * max(1, k - few))
        return chosen.scatter(1, rest[:, spread], True)
