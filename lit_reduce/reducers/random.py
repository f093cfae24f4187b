"""Random selection, a baseline."""

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
    """Keeps a random set of positions, the same for every image of N tokens; sets of smaller budgets are subsets.

    The set depends on the seed and N only, not on the batch or the order of calls; use several seeds to measure the
    variance.
    """

    name = "random"
    paper = "control"
    config_class = RandomConfig

    def score(self, tokens: VisualTokens) -> Tensor:
        """A random permutation ``[B, N]``, drawn on the CPU so that all devices agree."""
        draw = torch.randperm(tokens.count, generator=torch.Generator().manual_seed(self.config.seed))
        return draw.to(tokens.features.device, torch.float32).expand(len(tokens.features), -1)
