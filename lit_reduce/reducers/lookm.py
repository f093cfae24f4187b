"""LOOK-M: once the prompt is read, the cache forgets the visual keys that its words looked at least."""

from torch import Tensor

from lit_reduce.reducer import ScoringReducer, register
from lit_reduce.tokens import VisualTokens


@register
class LookM(ScoringReducer):
    """Scores a visual key by the attention that the prompt's words pay it, in each layer for itself.

    Text keys always stay, as in the paper's text-prior eviction. Our reading: the mean over heads, so that all heads of
    a layer keep the same places; the mean over the prompt's words; and no merging of what goes into what stays. The
    prompt itself is read with all tokens: this method saves memory and time at decode, not before.

    Source: LOOK-M, arXiv 2406.18139.
    """

    name = "lookm"
    site = "cache"
    signals = frozenset({"text_rows"})
    paper = "LOOK-M, arXiv 2406.18139"

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:  # noqa: ARG002
        """Every layer keeps as many."""
        return dict.fromkeys(range(depth), keep)

    def score(self, tokens: VisualTokens) -> Tensor:
        """Sum over the words ``[B, N]``; words before the image look at none of its tokens."""
        return tokens.signal("text_rows").float().sum(1)
