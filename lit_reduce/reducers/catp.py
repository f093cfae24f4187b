"""CATP, first stage: coverage of the image plus relevance to the prompt."""

from dataclasses import dataclass

from lit_reduce.ops.greedy import coverage
from lit_reduce.ops.similarity import cosine, to_float32
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class CATPConfig(ReducerConfig):
    """Settings of `CATP`."""

    relevance: float = option(0.7, "weight of a token's similarity to the words")


@register
class CATP(Reducer):
    """Facility location on ``(cosine + 1) / 2`` of projected tokens, plus 0.7 times that with the mean prompt token.

    The paper keeps ``S (1 - R / 2)`` tokens this way and drops as many more inside the language model, over all images
    of a prompt together; that second stage is not included. The whole prompt serves as the text of each image (our
    reading).
    """

    name = "catp"
    signals = frozenset({"text"})
    paper = "CATP, AAAI 2026"
    config_class = CATPConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Greedy selection per image."""
        mask = tokens.signal("text_mask").bool()[..., None]
        words = to_float32(tokens.signal("text")).masked_fill(~mask, 0).sum(1, keepdim=True)
        mean = words / mask.sum(1, keepdim=True).clamp_min(1)
        bonus = self.config.relevance * (cosine(tokens.features, mean)[..., 0] + 1) / 2
        return Reduction(coverage((cosine(tokens.features) + 1) / 2, keep, bonus=bonus), scores=bonus)
