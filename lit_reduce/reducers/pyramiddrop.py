"""PyramidDrop: drop visual tokens stage by stage, as deeper layers need fewer."""

from dataclasses import dataclass

from torch import Tensor

from lit_reduce.options import option
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import VisualTokens


@dataclass
class PyramidDropConfig(ReducerConfig):
    """Number of stages."""

    steps: int = option(3, "how often tokens are dropped, at even distances over the depth", min=1)


@register
class PyramidDrop(ScoringReducer):
    """Scores a token by the attention of the prompt's last token, mean over heads, recomputed at each stage.

    With S steps the decoder is divided into S + 1 equal parts; each step keeps the same ratio, and ``keep`` tokens
    remain in the last part. For an eighth of the tokens and three steps this is the paper: halving before layers 8, 16
    and 24 of 32. The paper scores with queries and keys of the next layer; this implementation reads the attention of
    the previous layer, which is computed anyway (our reading). Positions stay original, where the paper renumbers.

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
        """``steps`` stages; fewer if the decoder has too few layers."""
        steps = min(self.config.steps, depth - 1)
        share = keep / tokens
        counts = [max(keep, round(tokens * share ** (step / steps))) for step in range(1, steps + 1)]
        return {max(1, round(depth * step / (steps + 1))): counts[step - 1] for step in range(1, steps + 1)}

    def score(self, tokens: VisualTokens) -> Tensor:
        """Attention row of the prompt's last token ``[B, N]``."""
        return tokens.signal("last").float()
