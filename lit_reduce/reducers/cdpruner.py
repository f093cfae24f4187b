"""CDPruner: a determinantal point process that selects diverse and relevant tokens."""

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
    """Greedy MAP of a DPP with kernel ``r_i cos(x_i, x_j) r_j``: projected tokens x, min-max normalised relevance r.

    The relevance of the paper and of the official code is a cosine with CLIP text embeddings, which needs the text
    tower and the projections of CLIP; LLaVA checkpoints lack both. Ours is the mean cosine of the projected token with
    the prompt's embeddings. The official code negates the cosines (``parity="official"``), where the paper does not,
    and normalises over the whole batch; ours normalises per image, so that the batch does not matter. The kernel is
    that of the official code.
    """

    name = "cdpruner"
    signals = frozenset({"text"})
    paper = "CDPruner, arXiv 2506.10967"
    config_class = CDPrunerConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Beyond the rank of the kernel the more relevant tokens are selected."""
        cosines = text_relevance(tokens.features, tokens.signal("text"), tokens.signal("text_mask"))
        relevance = min_max(-cosines if self.config.parity == "official" else cosines, floor=1e-6)
        theta = self.config.theta
        weight = relevance if theta < 0 else (relevance * theta / (2 * (1 - theta))).exp()
        alike = cosine(tokens.features)
        alike.diagonal(dim1=1, dim2=2).fill_(1)  # not 0.9999999: rounding must not decide between equal tokens
        kernel = weight[:, :, None] * alike * weight[:, None]
        return Reduction(dpp_greedy(kernel, keep), scores=relevance)
