"""FasterVLM: what the vision tower's CLS token looks at is what stays."""

from torch import Tensor

from lit_reduce.reducer import ScoringReducer, register
from lit_reduce.tokens import VisualTokens


@register
class FasterVLM(ScoringReducer):
    """Scores a token by the CLS token's attention to it, mean over heads, in the layer that the features come from."""

    name = "fastervlm"
    signals = frozenset({"cls"})
    paper = "FasterVLM, arXiv 2412.01818"

    def score(self, tokens: VisualTokens) -> Tensor:
        """The CLS row ``[B, N]``."""
        return tokens.signal("cls").float()
