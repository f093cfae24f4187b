"""CDPruner: a determinantal point process, diverse and relevant to the prompt at once."""

from dataclasses import dataclass

from lit_reduce.ops.greedy import dpp_greedy
from lit_reduce.ops.modifiers import min_max
from lit_reduce.ops.scorers import text_relevance
from lit_reduce.ops.similarity import cosine
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class CDPrunerConfig(ReducerConfig):
    """Settings of `CDPruner`."""

    theta: float = option(-1.0, "weight of relevance in [0, 1): exp(r theta / 2 (1 - theta)); negative for r")
    parity: str = option("paper", "official turns the relevance round", choices=("paper", "official"))


@register
class CDPruner(Reducer):
    """Kernel ``r_i cos(v_i, v_j) r_j`` on the tower's features, greedy MAP; relevance r min-max normalised per image.

    The paper's relevance is a cosine in CLIP's joint space, which needs CLIP's text tower and projections, absent from
    LLaVA checkpoints; cosines of projected tokens with the prompt's embeddings are our reading. The official code
    negates the cosine (``parity="official"``), and normalises over the whole batch, which we never do.
    """

    name = "cdpruner"
    signals = frozenset({"text", "encoder"})
    paper = "CDPruner, arXiv 2506.10967"
    config_class = CDPrunerConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Of tokens beyond the kernel's rank the more relevant stay."""
        cosines = text_relevance(tokens.features, tokens.signal("text"), tokens.signal("text_mask"))
        relevance = min_max(-cosines if self.config.parity == "official" else cosines, floor=1e-6)
        theta = self.config.theta
        weight = relevance if theta < 0 else (relevance * theta / (2 * (1 - theta))).exp()
        alike = cosine(tokens.signal("encoder"))
        alike.diagonal(dim1=1, dim2=2).fill_(1)  # not 0.9999999: among equals rounding must not decide
        kernel = weight[:, :, None] * alike * weight[:, None]
        return Reduction(dpp_greedy(kernel, keep), scores=relevance)
