"""VisionDrop: pyramid pruning in the decoder by visual-to-visual attention, without the prompt."""

from dataclasses import dataclass

from lit_reduce.ops.budgets import geometric_schedule
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.reducers.visionzip import dominant_and_contextual
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class VisionDropConfig(ReducerConfig):
    """Settings of `VisionDrop`."""

    layers: str = option("0.25,0.5,0.75", "where, as shares of the depth (8, 16, 24 of 32)")


@register
class VisionDrop(Reducer):
    """Keeps the tokens that receive the most attention from visual tokens in the decoder, and merges the others.

    Contextual tokens are sums as in the official code: a token plus the mean of those assigned to it. The official code
    reads the attention of all visual tokens in the layer that follows, and compares its keys; ours reads up to 64
    evenly spaced visual tokens in the layer before, whose attention is computed anyway, and compares hidden states (our
    reading). Positions stay original, where the official code renumbers. The paper's stage in the encoder is
    `visionzip`, which can be attached as well. The budget is the count after the last stage, with a constant ratio per
    stage.

    Source: VisionDrop, arXiv 2506.22283.
    """

    name = "visiondrop"
    kind = "resample"
    site = "decoder"
    signals = frozenset({"image_rows"})
    paper = "VisionDrop, arXiv 2506.22283"
    config_class = VisionDropConfig

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """Stages before the layers of the settings."""
        return geometric_schedule([float(share) for share in self.config.layers.split(",")], depth, tokens, keep)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """See `dominant_and_contextual`."""
        received = tokens.signal("image_rows").float().sum(1)
        return dominant_and_contextual(tokens.features, received, tokens.features, keep, added=True)
