"""SCOPE: cover all of the picture, salient parts first."""

from dataclasses import dataclass

from lit_reduce.ops.greedy import coverage
from lit_reduce.ops.similarity import cosine
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class ScopeConfig(ReducerConfig):
    """Settings of `Scope`."""

    alpha: float = option(1.0, "power of the saliency")
    mode: str = option("times", "how saliency joins the coverage gain", choices=("times", "plus"))


@register
class Scope(Reducer):
    """Facility location on the tower's features, each gain times (or plus) the CLS attention to the power alpha.

    Attention is the mean over heads where the paper sums them: the same for ``times``.
    """

    name = "scope"
    signals = frozenset({"cls", "encoder"})
    paper = "SCOPE, arXiv 2510.24214"
    config_class = ScopeConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Greedy, image by image."""
        salient = tokens.signal("cls").float()
        power = salient.clamp_min(0) ** self.config.alpha
        weight, bonus = (power, None) if self.config.mode == "times" else (None, power)
        return Reduction(coverage(cosine(tokens.signal("encoder")), keep, weight, bonus), scores=salient)
