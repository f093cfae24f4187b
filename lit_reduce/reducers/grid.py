"""Uniform grid selection, a baseline without any scoring."""

from lit_reduce.ops.selectors import uniform_grid
from lit_reduce.reducer import Reducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@register
class GridReducer(Reducer):
    """Keeps the centre token of each of K even cells."""

    name = "grid"
    paper = "control"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The same cells for every image."""
        kept_indices = uniform_grid(tokens.grid, tokens.count, keep).to(tokens.features.device)
        return Reduction(kept_indices.expand(len(tokens.features), -1))
