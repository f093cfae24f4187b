"""GlobalCom2: the overview of a tiled image allocates the budget of its crops and contributes to their scores."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_reduce.ops.budgets import largest_remainder
from lit_reduce.ops.modifiers import unit_length
from lit_reduce.ops.selectors import share_topk, true_indices
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
    """The overview keeps the ratio r of the budget; crop i keeps ``r (1 + p_i - mean p)``, p a softmax of importance.

    The importance of a crop is the sum of the overview's scores in its region. The tokens of a crop are scored by their
    own scores plus the upsampled scores of the overview, each normalised to unit length within the crop. Scores are CLS
    logits of the last tower layer; the signal holds probabilities averaged over heads, so logarithms relative to
    uniform attention are used (our reading). Shares are rounded so that exactly K tokens remain. An image without tiles
    is plain top-k. Newline tokens are kept last; the official code keeps all of them, beside the budget.
    """

    name = "globalcom2"
    signals = frozenset({"cls@-1"})
    paper = "GlobalCom2, arXiv 2501.05179"
    config_class = GlobalCom2Config

    def score(self, tokens: VisualTokens) -> Tensor:
        """Logits ``[B, N]``, 0 for a token with mean attention."""
        attention = tokens.signal("cls@-1").float()
        return (attention / attention.mean(-1, keepdim=True).clamp_min(1e-12)).clamp_min(1e-6).log()

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Top-k within the overview and within each crop."""
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
        return Reduction(true_indices(chosen, keep), scores=scores)
