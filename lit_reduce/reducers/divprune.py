"""DivPrune: keep the tokens that differ most from one another."""

from lit_reduce.ops.greedy import farthest_point
from lit_reduce.reducer import Reducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@register
class DivPrune(Reducer):
    """Max-min diversity on the cosine distance of the projected tokens; needs neither prompt nor attention."""

    name = "divprune"
    paper = "DivPrune, arXiv 2503.02175"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Greedy farthest-point choice, image by image."""
        return Reduction(farthest_point(tokens.features, keep))
