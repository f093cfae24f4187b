"""Random tokens: the floor that every method must beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_reduce.options import option
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import VisualTokens


@dataclass
class RandomConfig(ReducerConfig):
    """Settings of `RandomReducer`."""

    seed: int = option(0, "which random choice")


@register
class RandomReducer(ScoringReducer):
    """Keeps a random set of places, the same for every image of N tokens; a smaller budget keeps a part of it.

    It depends on the seed and N only. So neither batch mates nor call order matter; take several seeds for the spread.
    """

    name = "random"
    paper = "control"
    config_class = RandomConfig

    def score(self, tokens: VisualTokens) -> Tensor:
        """A random permutation ``[B, N]``, drawn on the CPU so that all devices agree."""
        draw = torch.randperm(tokens.count, generator=torch.Generator().manual_seed(self.config.seed))
        return draw.to(tokens.features.device, torch.float32).expand(len(tokens.features), -1)
