"""Plain attention, for training: at pocket's lengths its two passes take CPUs two thirds of the fused kernel's time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

PLAIN = "pocket_plain"


def logits_of(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Returns the logits [B, H, Q, K] of attention in float32, with the additive mask in them."""
    logits = ((q * scaling) @ k.transpose(-1, -2)).float()
    return logits if mask is None else logits + mask


def plain_attention(
    _module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float = 1.0, **_: Any
) -> tuple[Tensor, None]:
    """What transformers calls for a layer: q, k, v [B, H, L, D] to [B, L, H, D]."""
    weights = logits_of(q, k, mask, scaling).softmax(-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register(PLAIN, plain_attention)


@contextmanager
def attending(config: Any, kernel: str = PLAIN) -> Iterator[None]:
    """Inside the block the layers of ``config`` attend with ``kernel``."""
    before, config._attn_implementation = config._attn_implementation, kernel
    try:
        yield
    finally:
        config._attn_implementation = before
