"""Pool the overview of a tiled image and drop its crops; a baseline."""

import torch
from torch import Tensor

from lit_reduce.ops.mergers import average_pool
from lit_reduce.ops.tiles import Tiling, tiling
from lit_reduce.reducer import Reducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@register
class Overview(Reducer):
    """Average pooling of the overview to ``keep`` cells; a token of a crop is assigned to the cell at its place.

    Without an overview, or if ``keep`` exceeds its size, the whole image is pooled, as by ``pool``.
    """

    name = "overview"
    kind = "resample"
    paper = "control"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The same cells for every image."""
        batch, tiles = len(tokens.features), tiling(tokens.grid, tokens.count)
        if tiles is None or keep > tiles.overview[0] * tiles.overview[1]:
            pooled, kept_indices, assignment = average_pool(tokens.features, tokens.grid, keep)
        else:
            own = slice(tiles.first, tiles.first + tiles.overview[0] * tiles.overview[1])
            pooled, kept_indices, cell = average_pool(tokens.features[:, own], (1, *tiles.overview), keep)
            kept_indices, assignment = kept_indices + tiles.first, torch.full((tokens.count,), -1, device=cell.device)
            assignment[own] = cell
            assignment[tiles.place >= 0] = cell[shown(tiles).to(cell.device)]
        return Reduction(kept_indices.expand(batch, -1), features=pooled, assignment=assignment.expand(batch, -1))


def shown(tiles: Tiling) -> Tensor:
    """For each token of the crops, in order, the index of the overview token at its place."""
    place = tiles.place[tiles.place >= 0]
    row, column = place // tiles.whole[1], place % tiles.whole[1]
    return row * tiles.overview[0] // tiles.whole[0] * tiles.overview[1] + column * tiles.overview[1] // tiles.whole[1]
