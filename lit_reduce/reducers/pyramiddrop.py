"""PyramidDrop: fewer visual tokens stage by stage, because deeper layers need fewer."""

from dataclasses import dataclass

from torch import Tensor

from lit_reduce.options import option
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import VisualTokens


@dataclass
class PyramidDropConfig(ReducerConfig):
    """The pyramid's steps."""

    steps: int = option(3, "how often tokens are dropped, at even distances over the depth", min=1)


@register
class PyramidDrop(ScoringReducer):
    """Scores a token by the attention that the prompt's last token pays it, mean over heads, anew at each step.

    With S steps the decoder has S + 1 even parts; each step keeps the same share, so that ``keep`` tokens are left for
    the last part. For an eighth of the tokens and three steps these are the paper's halves before layers 8, 16 and 24
    of 32. The paper ranks with queries and keys of the layer that follows; ours reads the attention of the layer
    before, which is computed anyway (our reading). Positions stay original, where the paper counts anew.

    Source: PyramidDrop, arXiv 2410.17247.
    """

    name = "pyramiddrop"
    site = "decoder"
    signals = frozenset({"last"})
    paper = "PyramidDrop, arXiv 2410.17247"
    config_class = PyramidDropConfig

    def __init__(self, config: PyramidDropConfig | None = None) -> None:
        super().__init__(config)

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """``steps`` stages; a decoder with fewer layers than parts takes as many as fit."""
        steps = min(self.config.steps, depth - 1)
        share = keep / tokens
        counts = [max(keep, round(tokens * share ** (step / steps))) for step in range(1, steps + 1)]
        return {max(1, round(depth * step / (steps + 1))): counts[step - 1] for step in range(1, steps + 1)}

    def score(self, tokens: VisualTokens) -> Tensor:
        """The attention row ``[B, N]``."""
        return tokens.signal("last").float()
