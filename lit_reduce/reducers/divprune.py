"""DivPrune: keep the most diverse subset of tokens."""

from lit_reduce.ops.greedy import farthest_point
from lit_reduce.reducer import Reducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@register
class DivPrune(Reducer):
    """Max-min diversity by cosine distance of the projected tokens; uses neither prompt nor attention."""

    name = "divprune"
    paper = "DivPrune, arXiv 2503.02175"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Farthest-point selection per image."""
        return Reduction(farthest_point(tokens.features, keep))
