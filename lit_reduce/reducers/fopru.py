"""FoPru: prune by the attention that tokens receive in the vision tower."""

from dataclasses import dataclass

from torch import Tensor

from lit_reduce.ops.selectors import row_topk
from lit_reduce.options import option
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class FoPruConfig(ReducerConfig):
    """Settings of `FoPru`."""

    strategy: str = option("rank", "rank: the best tokens; row: the best rows", choices=("rank", "row"))


@register
class FoPru(ScoringReducer):
    """Rank or row strategy on received attention; that the last row may be incomplete is our reading."""

    name = "fopru"
    signals = frozenset({"received"})
    paper = "FoPru, arXiv 2411.14164"
    config_class = FoPruConfig

    def score(self, tokens: VisualTokens) -> Tensor:
        """Mean attention that each token receives ``[B, N]``."""
        return tokens.signal("received").float()

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The row strategy needs a token count that the columns divide; other inputs use the rank strategy."""
        columns = tokens.grid[2]
        if self.config.strategy == "rank" or tokens.count % columns:
            return super().reduce(tokens, keep)
        scores = self.score(tokens)
        return Reduction(row_topk(scores, columns, keep), scores=scores)
