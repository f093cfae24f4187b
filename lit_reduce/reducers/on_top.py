"""Base class of modifiers, which wrap any other reducer."""

from dataclasses import dataclass
from typing import Any

from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, create
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class OnTopConfig(ReducerConfig):
    """Settings of every modifier."""

    on: str = option("fastervlm", "the reducer beneath; modifiers before it, joined by +: centre+divprune")
    options: dict[str, Any] = option({}, "settings of the reducer beneath")


class OnTop(Reducer):
    """A reducer that changes the input or the output of an inner reducer.

    Kind, site, stages and signals are those of the inner reducer; a subclass may add signals.
    """

    signals = frozenset({"cls"})  # what the default beneath needs
    config_class = OnTopConfig

    def __init__(self, config: OnTopConfig | None = None) -> None:
        super().__init__(config)
        outer, _, rest = self.config.on.partition("+")
        self.inner = create(outer, **({"on": rest, "options": self.config.options} if rest else self.config.options))
        self.kind, self.site = self.inner.kind, self.inner.site
        self.signals = self.inner.signals

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """Those of the inner reducer."""
        return self.inner.stages(depth, tokens, keep)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Call the inner reducer."""
        reduction: Reduction = self.inner(tokens, keep)
        return reduction
