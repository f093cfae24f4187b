"""GlobalCom2: the overview says how much of each crop stays, and helps to say what."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_reduce.ops.budgets import largest_remainder
from lit_reduce.ops.modifiers import unit_length
from lit_reduce.ops.selectors import places, share_topk
from lit_reduce.ops.tiles import regions, tiling
from lit_reduce.options import option
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class GlobalCom2Config(ReducerConfig):
    """Settings of `GlobalCom2`."""

    temperature: float = option(10.0, "divides a crop's importance before the softmax", above=0)
    overview: str = option("first", "which tile is the overview", choices=("first", "last"))


@register
class GlobalCom2(ScoringReducer):
    """The overview keeps the budget's ratio r, crop i ``r (1 + p_i - mean p)`` with p the softmax of its importance.

    A crop's importance is the sum of the overview's scores in its place; a crop's tokens go by their own scores plus
    the overview's, enlarged, each of unit length in the crop. Scores are CLS logits of the last tower layer; from the
    signal, which holds probabilities averaged over heads, we take logarithms relative to uniform attention (our
    reading). Shares are rounded so that exactly K stay. A picture in one piece is plain top-k. Newline tokens are the
    last to stay; the official code keeps all of them, beside the budget.
    """

    name = "globalcom2"
    signals = frozenset({"cls@-1"})
    paper = "GlobalCom2, arXiv 2501.05179"
    config_class = GlobalCom2Config

    def score(self, tokens: VisualTokens) -> Tensor:
        """Logits ``[B, N]``, 0 for a token that gets the mean attention."""
        attention = tokens.signal("cls@-1").float()
        return (attention / attention.mean(-1, keepdim=True).clamp_min(1e-12)).clamp_min(1e-6).log()

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Overview and crops each keep the best of their own."""
        tiles = tiling(tokens.grid, tokens.count, self.config.overview)
        if tiles is None:
            return super().reduce(tokens, keep)
        logits, device = self.score(tokens), tokens.features.device
        part, place = tiles.part.to(device), tiles.place.to(device)
        overview, *caps, newlines = part.bincount(minlength=2 + tiles.crops[0] * tiles.crops[1]).tolist()
        small = logits[:, tiles.first : tiles.first + overview]
        large = F.interpolate(small.view(-1, 1, *tiles.overview), size=tiles.whole, mode="bilinear").flatten(1)

        where = regions(tiles.overview, tiles.crops).to(device)
        importance = small.new_zeros(len(small), len(caps)).index_add(1, where, small)
        p = (importance / self.config.temperature).softmax(-1)
        wish = (1 + p - p.mean(-1, keepdim=True)) * torch.tensor(caps, device=device)
        real = min(keep, tokens.count - newlines)
        full = max(int(overview * real / (tokens.count - newlines)), real - sum(caps))
        shares = largest_remainder(wish, real - full, caps)

        scores = logits.clone()
        for number in range(len(caps)):
            members = (part == number + 1).nonzero()[:, 0]
            scores[:, members] = unit_length(logits[:, members]) + unit_length(large[:, place[members]])
        chosen = share_topk(scores, part, F.pad(F.pad(shares, (1, 0), value=full), (0, 1), value=keep - real))
        return Reduction(places(chosen, keep), scores=scores)
