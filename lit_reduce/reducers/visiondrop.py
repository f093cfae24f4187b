"""VisionDrop: a pyramid inside the language model that asks only the picture itself."""

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
    """Tokens that visual tokens attend to stay; a few contextual ones take in the rest, three times on the way.

    The paper reads visual-to-visual attention of the language model; the signal here is that of the vision tower,
    carried along: our reading. What is compared is the hidden state, not keys. Its stage in the encoder is `visionzip`,
    which can be attached beside this one. The budget is what is left after the last stage, equal shares go at each.
    """

    name = "visiondrop"
    kind = "resample"
    site = "decoder"
    signals = frozenset({"received"})
    paper = "VisionDrop, arXiv 2506.22283"
    config_class = VisionDropConfig

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """Three stages."""
        return geometric_schedule([float(share) for share in self.config.layers.split(",")], depth, tokens, keep)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """See `dominant_and_contextual`."""
        return dominant_and_contextual(tokens.features, tokens.signal("received").float(), tokens.features, keep)
