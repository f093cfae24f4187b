"""Cen-Prune: take the mean of the picture out of its tokens before comparing them."""

import dataclasses

from lit_reduce.ops.modifiers import centre
from lit_reduce.reducer import register
from lit_reduce.reducers.on_top import OnTop
from lit_reduce.tokens import Reduction, VisualTokens


@register
class Centre(OnTop):
    """The reducer beneath sees features and tower features less their mean over the image.

    Tokens of one picture share a large common part, which makes all cosines alike. New tokens get the mean back, which
    is exact for those that are means. Our reading: the paper's text was not available.
    """

    name = "centre"
    paper = "Cen-Prune"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Mean of each image by itself."""
        x = tokens.features
        moved = {name: centre(tokens.signals[name]) for name in tokens.signals if name.partition("@")[0] == "encoder"}
        here = dataclasses.replace(tokens, features=centre(x), signals={**tokens.signals, **moved})
        reduction = super().reduce(here, keep)
        if reduction.features is None:
            return reduction
        mean = x.float().mean(1, keepdim=True).to(x.dtype)
        return dataclasses.replace(reduction, features=reduction.features + mean)
