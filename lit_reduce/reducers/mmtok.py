"""MMTok: the subset of tokens that best covers the prompt and the image."""

from dataclasses import dataclass

import torch

from lit_reduce.ops.greedy import coverage
from lit_reduce.ops.scorers import text_coverage
from lit_reduce.ops.similarity import cosine
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class MMTokConfig(ReducerConfig):
    """Settings of `MMTok`."""

    alpha: float = option(0.5, "weight of covering the picture; 0 covers the text alone")
    text_temperature: float = option(0.02, "sharpness of text rows; smaller is sharper", above=0)
    image_temperature: float = option(0.2, "sharpness of picture rows", above=0)


@register
class MMTok(Reducer):
    """Facility location over a row for each prompt token and each visual token, softmax over the candidates.

    Text rows compare prompt embeddings with projected tokens, image rows compare tower features. The official code
    embeds the words of the question without stop words; we use the whole prompt, since a reducer gets no strings (our
    reading).

    Source: MMTok, arXiv 2508.18264.
    """

    name = "mmtok"
    signals = frozenset({"text", "encoder"})
    paper = "MMTok, arXiv 2508.18264"
    config_class = MMTokConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Greedy selection per image."""
        chosen = self.config
        text, mask = tokens.signal("text"), tokens.signal("text_mask")
        words = text_coverage(tokens.features, text, mask, chosen.text_temperature)
        places = (cosine(tokens.signal("encoder")) / chosen.image_temperature).softmax(-1) / tokens.count
        return Reduction(coverage(torch.cat([words.to(places), chosen.alpha * places], 1), keep))
