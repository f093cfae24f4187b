"""What is trained between tower and language model; at export it becomes LLaVA's own projector."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

PARTS = ("mean", "std", "linear_1.weight", "linear_1.bias")


class Projector(nn.Module):
    """Standardised channels, two linear layers, GELU between them.

    Attributes:
        mean, std: ``[channels]`` of the tower's states, so that the optimizer sees channels of one size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.linear_1, self.linear_2 = nn.Linear(channels, width), nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        """Visual tokens ``[..., width]`` of states ``[..., channels]``."""
        hidden = self.linear_1((states - self.mean) / self.std)
        out: Tensor = self.linear_2(nn.functional.gelu(hidden))
        return out

    def standardise(self, states: Tensor) -> None:
        """Measure mean and deviation on states ``[..., channels]``."""
        flat = states.flatten(0, -2)
        self.mean.copy_(flat.mean(0))
        self.std.copy_(flat.std(0))

    @torch.no_grad()
    def match_norm(self, states: Tensor, words: Tensor) -> None:
        """Scale the output so that visual tokens have the mean norm of word embeddings ``[words, width]``."""
        factor = words.norm(dim=-1).mean() / self(states).norm(dim=-1).mean()
        self.linear_2.weight.mul_(factor)
        self.linear_2.bias.mul_(factor)


def folded(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `LlavaMultiModalProjector` that computes what the trained ``projector.*`` do.

    In float64, so that every machine finds the same float32 weights and the backbone has one fingerprint.
    """
    mean, std, first, bias = (trained[f"projector.{name}"].double() for name in PARTS)
    first = first / std
    return {
        "linear_1.weight": first.float(), "linear_1.bias": (bias - (first * mean).sum(1)).float(),
        **{name: trained[f"projector.{name}"].float() for name in ("linear_2.weight", "linear_2.bias")},
    }  # fmt: skip


def averaged(states: Tensor, side: int) -> Tensor:
    """States ``[B, n * n, channels]`` averaged to ``side`` x ``side`` tokens."""
    n = round(states.shape[1] ** 0.5)
    if side == n:
        return states
    grid: Tensor = states.unflatten(1, (side, n // side, side, n // side)).mean((2, 4))
    return grid.flatten(1, 2)
