"""Attention for training, by whichever way takes CPUs less time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

MIXED = "pocket_mixed"
LONG = 256  # keys from which the fused kernel is faster, in float32


def logits_of(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Returns the logits [B, H, Q, K] of attention in float32, with the additive mask in them."""
    logits = ((q * scaling) @ k.transpose(-1, -2)).float()
    return logits if mask is None else logits.add_(mask)  # in place: a copy costs as much as the product


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention [B, H, Q, D]: two plain passes, or the fused kernel where that is faster.

    Measured forward and back on one thread, two passes take this part of the fused kernel's time: over 37 keys 0.8 in
    float32 and 0.1 in bfloat16; over 577 keys 1.7 and 0.8; over 865 keys with a mask 3.2 and 1.0.
    """
    if q.dtype == torch.float32 and k.shape[2] > LONG:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return logits_of(q, k, mask, scaling).softmax(-1).to(v.dtype) @ v


def mixed_attention(
    _module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float = 1.0, **_: Any
) -> tuple[Tensor, None]:
    """What transformers calls for a layer: q, k, v [B, H, L, D] to [B, L, H, D]."""
    return attend(q, k, v, mask, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(MIXED, mixed_attention)


@contextmanager
def attending(config: Any, kernel: str = MIXED) -> Iterator[None]:
    """Inside the block the layers of ``config`` attend with ``kernel``."""
    before, config._attn_implementation = config._attn_implementation, kernel
    try:
        yield
    finally:
        config._attn_implementation = before
