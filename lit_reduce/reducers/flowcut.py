"""FlowCut: prune in every second block of the vision tower by the information flow into CLS."""

from dataclasses import dataclass

from torch import Tensor

from lit_reduce.ops.scorers import information_flow
from lit_reduce.ops.similarity import to_float32
from lit_reduce.options import option
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import VisualTokens


@dataclass
class FlowCutConfig(ReducerConfig):
    """Settings of `FlowCut`."""

    pace: float = option(0.5, "how fast tokens go, in (0, 1]; 1 drops most in early blocks", above=0, max=1)
    heads: int = option(1, "attention heads that values fall in (CLIP-L has 16)", min=1)


@register
class FlowCut(ScoringReducer):
    """Scores a token by ``(relevance + meaning) * size`` of the information that CLS reads from it.

    See `information_flow`. With r blocks left ``(n - K) / sqrt(r) * pace`` of n tokens are dropped, in the last one all
    but K. The paper's pace follows the entropy of the attention, and its official code takes the fastest of a batch; a
    constant for all images is our reading, since a batch must have one count. So are the scores of the previous block
    alone instead of a running mean over blocks, and the attention-weighted mean of values in place of the value of CLS.

    Source: FlowCut, arXiv 2505.19536.
    """

    name = "flowcut"
    site = "encoder"
    point = "before"
    signals = frozenset({"cls", "values"})
    paper = "FlowCut, arXiv 2505.19536"
    config_class = FlowCutConfig

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """Stages before every second block, counted from the last one."""
        left, now = {}, tokens
        for layer in range(depth - 1, 0, -2)[::-1]:
            rest = depth - 1 - layer
            now -= round((now - keep) / rest**0.5 * self.config.pace) if rest else now - keep
            left[layer] = now
        return left

    def score(self, tokens: VisualTokens) -> Tensor:
        """``[B, N]``."""
        attention, values = tokens.signal("cls"), tokens.signal("values")
        weight = to_float32(attention) / to_float32(attention).sum(-1, keepdim=True).clamp_min(1e-12)
        reader = (weight[:, None] @ to_float32(values))[:, 0]
        return information_flow(attention, values, reader, self.config.heads)
