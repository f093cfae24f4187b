"""HiPrune: anchors that middle layers attend to, their neighbours, and registers that deep layers attend to."""

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
    """``round(K alpha / 5)`` anchors with their neighbours, the rest by the received attention of a deep layer.

    The official code takes the first token of the next row for the right neighbour of a row's last one; the paper's
    four neighbours stop at the border. ``parity="official"`` has the former.
    """

    name = "hiprune"
    signals = frozenset({"received", f"received@{HiPruneConfig.layer}"})
    paper = "HiPrune, arXiv 2508.00553"
    config_class = HiPruneConfig

    def __init__(self, config: HiPruneConfig | None = None) -> None:
        super().__init__(config)
        self.signals = frozenset({"received", f"received@{self.config.layer}"})

    def score(self, tokens: VisualTokens) -> Tensor:
        """The deep layer's received attention ``[B, N]``."""
        return tokens.signal("received").float()

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Anchors and neighbours rank above all registers; more of them than the budget go by the deep attention."""
        deep = self.score(tokens)
        kept_indices = ranks(tokens.signal(f"received@{self.config.layer}")) < round(keep * self.config.alpha / 5)
        protected = with_neighbours(kept_indices, tokens.grid, wrap=self.config.parity == "official")
        lift = deep.amax(-1, keepdim=True) - deep.amin(-1, keepdim=True) + 1
        return Reduction(topk_sorted(deep + lift * protected, keep), scores=deep)
