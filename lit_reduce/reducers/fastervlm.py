"""FasterVLM: keep the tokens with the most CLS attention."""

from torch import Tensor

from lit_reduce.reducer import ScoringReducer, register
from lit_reduce.tokens import VisualTokens


@register
class FasterVLM(ScoringReducer):
    """Scores a token by the attention of CLS, mean over heads, in the tower layer whose output the projector gets."""

    name = "fastervlm"
    signals = frozenset({"cls"})
    paper = "FasterVLM, arXiv 2412.01818"

    def score(self, tokens: VisualTokens) -> Tensor:
        """Attention row of CLS ``[B, N]``."""
        return tokens.signal("cls").float()
