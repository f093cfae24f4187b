"""Turbo: ToMe with a penalty on merging tokens that CLS attends to."""

from dataclasses import dataclass

from torch import Tensor

from lit_reduce.ops.similarity import to_float32
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
    """ToMe with the similarity ``cosine of keys - 30 alpha a``, where a is the CLS attention of the proposing token.

    The factor 30 is from the official code; its weight per layer, and its rule against merging when few tokens are
    left, are not included (our reading). Everything else is as in `ToMe`.
    """

    name = "turbo"
    signals = frozenset({"keys", "cls", "size"})
    paper = "Turbo, arXiv 2407.11717"
    config_class = TurboConfig

    def penalty(self, tokens: VisualTokens) -> Tensor:
        """Penalty on the similarity ``[B, N]``."""
        weight: float = 30 * self.config.alpha
        return weight * to_float32(tokens.signal("cls"))
