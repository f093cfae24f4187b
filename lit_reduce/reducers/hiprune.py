"""HiPrune: most attended tokens of a middle tower layer, their neighbours, and most attended ones of a deep layer."""

from dataclasses import dataclass

from torch import Tensor

from lit_reduce.ops.modifiers import with_neighbours
from lit_reduce.ops.selectors import ranks, topk_sorted
from lit_reduce.options import option
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class HiPruneConfig(ReducerConfig):
    """Settings of `HiPrune`."""

    layer: str = option("0.35", "middle layer of the tower: an index, or a share of the depth (8 of 24)")
    alpha: float = option(0.1, "share of the budget for anchors with their four neighbours", min=0, max=1)
    parity: str = option("paper", "official lets neighbours run over the end of a row", choices=("paper", "official"))


@register
class HiPrune(ScoringReducer):
    """Keeps ``round(K alpha / 5)`` anchors with their four neighbours, and the rest by attention in a deep layer.

    Both attentions are what a token receives, mean over heads and queries. The paper's four neighbours end at the
    border of the image. In the official code (``parity="official"``) the neighbour beside the border is the next token
    in raster order, in the row above or below, and a neighbour above the first or below the last row is the first or
    the last token of the image.

    Source: HiPrune, arXiv 2508.00553.
    """

    name = "hiprune"
    signals = frozenset({"received", f"received@{HiPruneConfig.layer}"})
    paper = "HiPrune, arXiv 2508.00553"
    config_class = HiPruneConfig

    def __init__(self, config: HiPruneConfig | None = None) -> None:
        super().__init__(config)
        self.signals = frozenset({"received", f"received@{self.config.layer}"})

    def score(self, tokens: VisualTokens) -> Tensor:
        """Attention received in the deep layer ``[B, N]``."""
        return tokens.signal("received").float()

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Anchors and neighbours come first; if they exceed the budget, those with the most deep attention."""
        deep = self.score(tokens)
        kept_indices = ranks(tokens.signal(f"received@{self.config.layer}")) < round(keep * self.config.alpha / 5)
        protected = with_neighbours(kept_indices, tokens.grid, wrap=self.config.parity == "official")
        lift = deep.amax(-1, keepdim=True) - deep.amin(-1, keepdim=True) + 1
        return Reduction(topk_sorted(deep + lift * protected, keep), scores=deep)
