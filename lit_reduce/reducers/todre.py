"""ToDRE, first stage: a diverse set that starts at the most attended token."""

from lit_reduce.ops.greedy import max_sum
from lit_reduce.reducer import Reducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@register
class ToDRE(Reducer):
    """Starts at the token with the highest CLS attention of the last layer, then adds the least similar token.

    Greedy max-sum diversity on the projected tokens, version 2 of the paper. Its second stage, which drops all visual
    tokens late in the language model, is not included. Of several tiles the first one is taken to be the thumbnail.
    """

    name = "todre"
    signals = frozenset({"cls@-1"})
    paper = "ToDRE, arXiv 2505.18757"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Greedy selection per image, from its own first token."""
        tile = tokens.grid[1] * tokens.grid[2] if tokens.grid[0] > 1 else tokens.count
        first = tokens.signal("cls@-1")[:, :tile].argmax(-1)
        return Reduction(max_sum(tokens.features, first, keep))
