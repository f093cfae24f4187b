"""SCOPE: facility location on tower features, weighted by CLS attention."""

from dataclasses import dataclass

from lit_reduce.errors import UserError
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
    heads: int = option(0, "attention heads of the tower, for mode=plus (CLIP-L has 16)", min=0)


@register
class Scope(Reducer):
    """Facility location on tower features, each gain times (or plus) the CLS attention to the power alpha.

    As in the official code attention is summed over heads. For ``times`` that changes nothing, so the mean is used;
    ``plus`` needs the number of heads.

    Source: SCOPE, arXiv 2510.24214.
    """

    name = "scope"
    signals = frozenset({"cls", "encoder"})
    paper = "SCOPE, arXiv 2510.24214"
    config_class = ScopeConfig

    def __init__(self, config: ScopeConfig | None = None) -> None:
        super().__init__(config)
        if self.config.mode == "plus" and self.config.heads < 1:
            raise UserError("scope: mode=plus adds attention summed over the tower's heads: give heads (CLIP-L has 16)")

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Greedy selection per image."""
        salient = tokens.signal("cls").float()
        power = (salient.clamp_min(0) * max(1, self.config.heads)) ** self.config.alpha
        weight, bonus = (power, None) if self.config.mode == "times" else (None, power)
        return Reduction(coverage(cosine(tokens.signal("encoder")), keep, weight, bonus), scores=salient)
