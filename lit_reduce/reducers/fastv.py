"""FastV: prune in an early decoder layer by the attention of the prompt's last token."""

from dataclasses import dataclass

from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.options import option
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import VisualTokens


@dataclass
class FastVConfig(ReducerConfig):
    """Layer at which FastV prunes."""

    layer: float = option(
        2, "drop before this decoder layer: a number (2), or a part of the depth below 1 (0.25)", above=0
    )


@register
class FastV(ScoringReducer):
    """Scores a token by the attention of the prompt's last token in the previous layer, mean over heads.

    From its layer on ``keep`` tokens of each image remain, at their original positions; earlier layers process all.

    Source: FastV, arXiv 2403.06764 (K is ``layer``, 2 by default; N(1 - R) is ``keep``).
    """

    name = "fastv"
    site = "decoder"
    signals = frozenset({"last"})
    paper = "FastV, arXiv 2403.06764"
    config_class = FastVConfig

    def __init__(self, config: FastVConfig | None = None) -> None:
        super().__init__(config)
        if self.config.layer >= 1 and self.config.layer != int(self.config.layer):
            raise UserError(f"fastv: layer={self.config.layer}: give a layer from 1 on, or a part of the depth below 1")

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:  # noqa: ARG002
        """One stage."""
        layer = self.config.layer
        return {int(layer) if layer >= 1 else max(1, round(layer * depth)): keep}

    def score(self, tokens: VisualTokens) -> Tensor:
        """Attention row of the prompt's last token ``[B, N]``."""
        return tokens.signal("last").float()
