"""VisPruner: half of the tokens by attention, the other half by removing near-duplicates."""

from dataclasses import dataclass

import torch

from lit_reduce.ops.selectors import ranks, thin_out
from lit_reduce.ops.similarity import cosine
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class VisPrunerConfig(ReducerConfig):
    """Settings of `VisPruner`."""

    important: float = option(0.5, "share of the budget that goes by attention, in [0, 1]", min=0, max=1)
    step: int = option(8, "near-duplicates dropped in a round", min=1)


@register
class VisPruner(Reducer):
    """``int(K / 2)`` tokens with the most CLS attention; the others by diversity, see `thin_out`."""

    name = "vispruner"
    signals = frozenset({"cls", "encoder"})
    paper = "VisPruner, arXiv 2412.01818"
    config_class = VisPrunerConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Similarity is the cosine of tower features."""
        attention = tokens.signal("cls").float()
        important = int(keep * self.config.important)
        order = ranks(attention).argsort(-1)
        rest = thin_out(order[:, important:], cosine(tokens.signal("encoder")), keep - important, self.config.step)
        return Reduction(torch.cat([order[:, :important], rest], 1).sort(-1).values, scores=attention)
