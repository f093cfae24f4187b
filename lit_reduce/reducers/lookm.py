"""LOOK-M: after prefill, evict visual keys that received little attention from the cache."""

from torch import Tensor

from lit_reduce.reducer import ScoringReducer, register
from lit_reduce.tokens import VisualTokens


@register
class LookM(ScoringReducer):
    """Scores a visual key by the attention of the prompt's text tokens, in each layer separately.

    Text keys always stay, as in the text-prior eviction of the paper. Our readings: the mean over heads, so that all
    heads of a layer keep the same positions; the mean over text tokens; no merging of evicted entries. The prompt is
    processed with all tokens: this method saves memory and time while decoding, not in prefill.

    Source: LOOK-M, arXiv 2406.18139.
    """

    name = "lookm"
    site = "cache"
    signals = frozenset({"text_rows"})
    paper = "LOOK-M, arXiv 2406.18139"

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:  # noqa: ARG002
        """The same count in every layer."""
        return dict.fromkeys(range(depth), keep)

    def score(self, tokens: VisualTokens) -> Tensor:
        """Attention summed over text tokens ``[B, N]``; text before the image attends to none of its tokens."""
        return tokens.signal("text_rows").float().sum(1)
