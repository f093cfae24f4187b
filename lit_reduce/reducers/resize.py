"""Bilinear resizing of the token grid, a baseline."""

from lit_reduce.ops.cells import cells
from lit_reduce.ops.resample import resample, resample_weights
from lit_reduce.reducer import Reducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@register
class ResizeReducer(Reducer):
    """Bilinear resizing with antialiasing to exactly K points, at the centres of their cells."""

    name = "resize"
    kind = "resample"
    paper = "control"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The same linear combination for every image."""
        x = tokens.features
        kept_indices, assignment = (part.to(x.device) for part in cells(tokens.grid, tokens.count, keep))
        made = resample(x, resample_weights(tokens.grid, tokens.count, keep, "tent"))
        return Reduction(kept_indices.expand(len(x), -1), features=made, assignment=assignment.expand(len(x), -1))
