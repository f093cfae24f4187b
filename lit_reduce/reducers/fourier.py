"""Fourier-VLM: low-pass filter of the token grid."""

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
    """Truncated two-dimensional discrete cosine transform, evaluated at K even points.

    The paper applies it before the projector and trains with it; applying it after the projector, frozen, is our
    reading. The official code scales a constant image by ``sqrt(N / K)``, which training absorbs but a frozen model
    does not; by default the length is kept.
    """

    name = "fourier"
    kind = "resample"
    paper = "Fourier-VLM, arXiv 2508.06038"
    config_class = FourierConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The same linear combination for every image."""
        x, grid, count = tokens.features, tokens.grid, tokens.count
        kept_indices, assignment = (part.to(x.device) for part in cells(grid, count, keep))
        weights = resample_weights(grid, count, keep, "cosine")
        if self.config.parity == "official":
            area = count / grid[0] if math.prod(grid) == count else count
            points = [bands * within for _, (_, bands), (_, within) in lattice(grid, count, keep)]
            weights = weights * (area / weights.new_tensor(points)).sqrt()[:, None]
        return Reduction(
            kept_indices.expand(len(x), -1), features=resample(x, weights), assignment=assignment.expand(len(x), -1)
        )
