"""VTC-CLS: CLS attention summed over several layers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_reduce.options import option
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import VisualTokens


@dataclass
class VTCCLSConfig(ReducerConfig):
    """Settings of `VTCCLS`."""

    layers: str = option(
        "0.68,0.72,0.76,0.80,0.845,0.885,0.925",
        "tower layers, as indices or shares of the depth; the default is 16 to 22 of 24",
    )


@register
class VTCCLS(ScoringReducer):
    """Scores a token by the CLS attention of the tower layers from 16 to the one whose output the projector gets."""

    name = "vtc_cls"
    signals = frozenset(f"cls@{layer}" for layer in VTCCLSConfig.layers.split(","))
    paper = "VTC-CLS, arXiv 2412.05819"
    config_class = VTCCLSConfig

    def __init__(self, config: VTCCLSConfig | None = None) -> None:
        super().__init__(config)
        self.layers = [layer.strip() for layer in self.config.layers.split(",")]
        self.signals = frozenset(f"cls@{layer}" for layer in self.layers)

    def score(self, tokens: VisualTokens) -> Tensor:
        """Sum of the layers' CLS attention rows ``[B, N]``."""
        scores = torch.zeros_like(tokens.signal(f"cls@{self.layers[0]}"), dtype=torch.float32)
        for layer in self.layers:  # one by one: the order of a sum over a stacked tensor depends on its shape
            scores = scores + tokens.signal(f"cls@{layer}").float()
        return scores
