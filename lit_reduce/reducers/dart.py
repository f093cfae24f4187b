"""DART: keep a few pivot tokens and the tokens least similar to them."""

from dataclasses import dataclass

import torch

from lit_reduce.ops.scorers import key_norm
from lit_reduce.ops.selectors import least_similar, ranks
from lit_reduce.ops.similarity import cosine, gather_tokens
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class DartConfig(ReducerConfig):
    """Settings of `Dart`."""

    image_pivots: int = option(4, "pivots among the visual tokens; they stay", min=0)
    text_pivots: int = option(4, "pivots among the prompt's tokens", min=0)


@register
class Dart(Reducer):
    """Pivots are the tokens with the largest L1 norm; each in turn adds the tokens least similar to it.

    The paper acts after a layer of the language model, with norms of keys; we act on projected tokens and prompt
    embeddings (our reading). Pivots are ordered by their norms, where the official code iterates over a Python set.
    Exactly K tokens are kept; the official code adds ``int(K / 8)`` tokens per pivot to the 4 image pivots and so keeps
    196, 132 and 68 of 192, 128 and 64.

    Source: DART, arXiv 2502.11494.
    """

    name = "dart"
    signals = frozenset({"text"})
    paper = "DART, arXiv 2502.11494"
    config_class = DartConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """A prompt with too few tokens repeats its strongest one as pivot."""
        x, text, mask = tokens.features, tokens.signal("text"), tokens.signal("text_mask").bool()
        order = ranks(key_norm(x))
        kept = order < min(self.config.image_pivots, keep)
        pivots = gather_tokens(x, order.argsort(-1)[:, : self.config.image_pivots])
        strong = ranks(key_norm(text).masked_fill(~mask, -1)).argsort(-1)[:, : self.config.text_pivots]
        strong = torch.where(mask.gather(1, strong), strong, strong[:, :1])
        pivots = torch.cat([pivots, gather_tokens(text, strong).to(x.dtype)], 1)
        return Reduction(least_similar(cosine(pivots, x), kept, keep))
