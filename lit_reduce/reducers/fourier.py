"""Fourier-VLM: only the low frequencies of the token grid stay."""

import math
from dataclasses import dataclass

from lit_reduce.ops.cells import cells, lattice
from lit_reduce.ops.resample import resample, resample_weights
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class FourierConfig(ReducerConfig):
    """Settings of `FourierReducer`."""

    parity: str = option(
        "paper",
        "official leaves the amplitudes of the cut orthonormal transform, sqrt(N / K) too large",
        choices=("paper", "official"),
    )


@register
class FourierReducer(Reducer):
    """Truncated two-dimensional cosine transform, read at K even points.

    The paper does this before the projector and trains with it; after the projector, frozen, is our reading. A constant
    picture comes out of the official code ``sqrt(N / K)`` times as long, which training absorbs and a frozen model does
    not; by default it keeps its length.
    """

    name = "fourier"
    kind = "resample"
    paper = "Fourier-VLM, arXiv 2508.06038"
    config_class = FourierConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The same mixture for every image."""
        x, grid, count = tokens.features, tokens.grid, tokens.count
        kept_indices, owner = (part.to(x.device) for part in cells(grid, count, keep))
        weights = resample_weights(grid, count, keep, "cosine")
        if self.config.parity == "official":
            area = count / grid[0] if math.prod(grid) == count else count
            points = [bands * within for _, (_, bands), (_, within) in lattice(grid, count, keep)]
            weights = weights * (area / weights.new_tensor(points)).sqrt()[:, None]
        return Reduction(
            kept_indices.expand(len(x), -1), features=resample(x, weights), assignment=owner.expand(len(x), -1)
        )
