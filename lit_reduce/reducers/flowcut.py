"""FlowCut: fewer tokens every other block of the vision tower, by what flows from them to CLS."""

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
    """Scores a token by ``(relevance + meaning) * size`` of what CLS reads from it, see `information_flow`.

    With r blocks to go ``(n - K) / sqrt(r) * pace`` of n tokens leave, at the end all but K. The paper's pace follows
    the entropy of the attention, its official code takes the fastest of a batch; one number for all pictures is our
    reading, since a batch must have one count. So are the score of the block just before instead of a running mean over
    blocks, and the attention-weighted mean of values for the value of CLS.
    """

    name = "flowcut"
    site = "encoder"
    point = "before"
    signals = frozenset({"cls", "values"})
    paper = "FlowCut, arXiv 2505.19536"
    config_class = FlowCutConfig

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """Before every second block, counted from the last one."""
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
