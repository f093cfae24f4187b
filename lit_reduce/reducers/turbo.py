"""Turbo: merge similar tokens inside the vision tower, but spare what CLS attends to."""

from dataclasses import dataclass

from torch import Tensor

from lit_reduce.ops.similarity import exact
from lit_reduce.options import option
from lit_reduce.reducer import register
from lit_reduce.reducers.tome import ToMe, ToMeConfig
from lit_reduce.tokens import VisualTokens


@dataclass
class TurboConfig(ToMeConfig):
    """Settings of `Turbo`."""

    alpha: float = option(5.0, "weight of attention against similarity, times 30")


@register
class Turbo(ToMe):
    """ToMe whose pairs go by ``cosine of keys - 30 alpha a``, with a the CLS attention of the token that would go.

    The factor 30 is the official code's; its weight of each layer, and its rule against merging when few tokens are
    left, are left out: our reading. All else is as in `ToMe`.
    """

    name = "turbo"
    signals = frozenset({"keys", "cls", "size"})
    paper = "Turbo, arXiv 2407.11717"
    config_class = TurboConfig

    def penalty(self, tokens: VisualTokens) -> Tensor:
        """Taken off the similarity ``[B, N]``."""
        weight: float = 30 * self.config.alpha
        return weight * exact(tokens.signal("cls"))
