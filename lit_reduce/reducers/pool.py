"""Average pooling, a baseline."""

from lit_reduce.ops.mergers import average_pool
from lit_reduce.reducer import Reducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@register
class PoolReducer(Reducer):
    """Replaces each of K even cells by the mean of its tokens, at the position of its centre."""

    name = "pool"
    kind = "resample"
    paper = "control"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The same cells for every image."""
        batch = len(tokens.features)
        pooled, kept_indices, assignment = average_pool(tokens.features, tokens.grid, keep)
        return Reduction(kept_indices.expand(batch, -1), features=pooled, assignment=assignment.expand(batch, -1))
