"""CATP, first stage: cover the picture and follow the words that belong to it."""

from dataclasses import dataclass

from lit_reduce.ops.greedy import coverage
from lit_reduce.ops.similarity import cosine, exact
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class CATPConfig(ReducerConfig):
    """Settings of `CATP`."""

    relevance: float = option(0.7, "weight of a token's similarity to the words")


@register
class CATP(Reducer):
    """Facility location on ``(cosine + 1) / 2`` plus 0.7 times that of each token with the mean word, projected space.

    The paper keeps ``S (1 - R / 2)`` tokens so and drops as many more inside the language model, over all pictures of a
    prompt at once; that stage is not part of it. The words are the whole prompt, not the picture's own: our reading.
    """

    name = "catp"
    signals = frozenset({"text"})
    paper = "CATP, AAAI 2026"
    config_class = CATPConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Greedy, image by image."""
        mask = tokens.signal("text_mask").bool()[..., None]
        words = exact(tokens.signal("text")).masked_fill(~mask, 0).sum(1, keepdim=True)
        mean = words / mask.sum(1, keepdim=True).clamp_min(1)
        bonus = self.config.relevance * (cosine(tokens.features, mean)[..., 0] + 1) / 2
        return Reduction(coverage((cosine(tokens.features) + 1) / 2, keep, bonus=bonus), scores=bonus)
