"""Cen-Prune: subtract the image mean from all tokens before another reducer compares them."""

import dataclasses

from lit_reduce.ops.modifiers import centre
from lit_reduce.reducer import register
from lit_reduce.reducers.on_top import OnTop
from lit_reduce.tokens import Reduction, VisualTokens


@register
class Centre(OnTop):
    """Passes features and tower features, each minus its mean over the image, to the inner reducer.

    Tokens of an image share a large common component, which makes all cosines similar. The mean is added back to new
    tokens, which is exact if they are means. Our reading: the text of the paper was not available.
    """

    name = "centre"
    paper = "Cen-Prune"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Subtract the mean of each image and call the inner reducer."""
        x = tokens.features
        moved = {name: centre(tokens.signals[name]) for name in tokens.signals if name.partition("@")[0] == "encoder"}
        here = dataclasses.replace(tokens, features=centre(x), signals={**tokens.signals, **moved})
        reduction = super().reduce(here, keep)
        if reduction.features is None:
            return reduction
        mean = x.float().mean(1, keepdim=True).to(x.dtype)
        return dataclasses.replace(reduction, features=reduction.features + mean)
