"""How the tokens of a shortened prompt relate to those of the original one."""

from dataclasses import dataclass, field

from torch import Tensor

from lit_reduce.backbones.families import Grid

Memory = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PromptMap:
    """Indices that map a shortened prompt of length S to the original one of length L.

    Attributes:
        selected: ``[B, L]``, true at the tokens that stayed; padding is false.
        order: ``[B, S]``, the original index of each token of the short prompt.
        valid: ``[B, S]``, the attention mask of the short prompt.
        positions: ``[B, L]`` position ids of the original prompt, or ``[R, B, L]`` of a model with R rows of them.
        kept_indices: The kept indices of each image, ascending.
        grids: Frames, rows and columns of each image.
        total: Visual tokens of each image before the reduction.
        kept: Visual tokens of each image after it.
        layers: See `per_layer`; empty where all layers work on what is kept.
        reducer_ms: Time spent in reducing and shortening, in milliseconds.
        memories: For images that layers of the language model look back at (kind ``recall``): `Reduction.memory`
            ``[N, S]``, and which of the kept tokens each of the N went into, -1 for none.
    """

    selected: Tensor
    order: Tensor
    valid: Tensor
    positions: Tensor
    kept_indices: list[Tensor]
    grids: list[Grid]
    total: list[int]
    kept: list[int]
    reducer_ms: float
    layers: list[float] = field(default_factory=list)
    memories: dict[int, Memory] = field(default_factory=dict)

    @property
    def per_layer(self) -> list[float]:
        """Tokens of each image that a layer of the language model works on, averaged over its layers."""
        return self.layers or [float(count) for count in self.kept]
