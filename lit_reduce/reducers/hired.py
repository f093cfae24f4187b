"""HiRED: distribute one budget over all tiles by the attention in the overview."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_reduce.ops.adaptive import ragged_indices
from lit_reduce.ops.budgets import largest_remainder
from lit_reduce.ops.selectors import ranks, share_topk, true_indices
from lit_reduce.ops.tiles import Tiling, regions, tiling
from lit_reduce.options import option
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class HiREDConfig(ReducerConfig):
    """Settings of `HiRED`."""

    alpha: float = option(0.5, "share of the budget for the overview", min=0, max=1)
    overview: str = option("first", "which tile is the overview", choices=("first", "last"))
    parity: str = option(
        "paper",
        "official cuts the overview into stripes instead of crops, and loses what rounding leaves over",
        choices=("paper", "official"),
    )


@register
class HiRED(ScoringReducer):
    """Half of the budget goes to the overview; crops share the rest by the top overview tokens they contain.

    The shares count the top ``1 - alpha`` of the overview by the CLS attention of the first tower layer; tokens are
    selected by that of the layer whose output the projector gets. An image without tiles is plain top-k. Newline tokens
    are kept last.
    """

    name = "hired"
    signals = frozenset({"cls", "cls@0"})
    paper = "HiRED, arXiv 2408.10945"
    config_class = HiREDConfig

    def score(self, tokens: VisualTokens) -> Tensor:
        """CLS attention of the deep layer ``[B, N]``."""
        return tokens.signal("cls").float()

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """With ``parity="official"`` rounding may lose a few tokens, fewer than there are crops."""
        tiles = tiling(tokens.grid, tokens.count, self.config.overview)
        if tiles is None:
            return super().reduce(tokens, keep)
        scores, part = self.score(tokens), tiles.part.to(tokens.features.device)
        overview, *caps, newlines = part.bincount(minlength=2 + tiles.crops[0] * tiles.crops[1]).tolist()
        real = min(keep, tokens.count - newlines)
        full = max(1, min(int(real * self.config.alpha), overview), real - sum(caps))
        shares = self.shares(tokens, tiles, real - full, caps)
        chosen = share_topk(scores, part, F.pad(F.pad(shares, (1, 0), value=full), (0, 1), value=keep - real))
        if self.config.parity == "official":
            kept_indices, valid = ragged_indices(chosen, keep)
            return Reduction(kept_indices, valid=valid, scores=scores)
        return Reduction(true_indices(chosen, keep), scores=scores)

    def shares(self, tokens: VisualTokens, tiles: Tiling, total: int, caps: list[int]) -> Tensor:
        """Number of tokens that each crop keeps ``[B, crops]``."""
        official, count = self.config.parity == "official", tiles.overview[0] * tiles.overview[1]
        first = tokens.signal("cls@0").float()[:, tiles.first : tiles.first + count]
        hot = ranks(first) < int(count * (1 - self.config.alpha))
        where = regions(tiles.overview, tiles.crops, stripes=official).to(first.device)
        share = torch.zeros(len(first), len(caps), device=first.device).index_add(1, where, hot.float())
        if not official:
            return largest_remainder(share, total, caps)
        part = share / share.sum(-1, keepdim=True).clamp_min(1)
        return (part * total).int().minimum(torch.tensor(caps, device=part.device)).long()
