"""Masks attention sinks, as VAR defines them, from the attention that a reducer reads."""

from dataclasses import dataclass, replace

from lit_reduce.ops.modifiers import sinks
from lit_reduce.options import option
from lit_reduce.reducer import register
from lit_reduce.reducers.on_top import OnTop, OnTopConfig
from lit_reduce.tokens import Reduction, VisualTokens

ATTENTION = ("cls", "received", "last", "text_rows")  # signals whose last dimension indexes visual tokens


@dataclass
class SinkMaskConfig(OnTopConfig):
    """Settings of `SinkMask`."""

    threshold: float = option(20.0, "a sink has an entry this many times its own rms")
    dims: str = option("", "entries that show sinks, joined by commas (2533,1415 in LLaMA-2-7B); empty: all")


@register
class SinkMask(OnTop):
    """Sets the attention paid to sink tokens to zero before the inner reducer reads it.

    VAR finds sinks by massive activations and redistributes their attention inside the language model, without dropping
    tokens; the use as a mask for scorers, on the features where the reducer acts, is our reading. Tokens with fewer
    than ``threshold**2`` entries cannot be sinks.
    """

    name = "sink_mask"
    paper = "VAR, arXiv 2503.03321"
    config_class = SinkMaskConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Mask every attention signal and call the inner reducer."""
        dims = tuple(int(dim) for dim in self.config.dims.split(",") if dim.strip())
        sink = sinks(tokens.features, self.config.threshold, dims)
        masked = {
            name: x.masked_fill(sink if x.ndim == 2 else sink[:, None], 0)
            for name, x in tokens.signals.items()
            if name.partition("@")[0] in ATTENTION
        }
        return super().reduce(replace(tokens, signals={**tokens.signals, **masked}), keep)
