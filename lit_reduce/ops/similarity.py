"""Cosine similarity and normalisation of tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F


def to_float32(x: Tensor) -> Tensor:
    """Convert to float32 unless float64 already; in half precision rounding would decide near ties."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """Normalise to unit length over the last dimension in float32, see `to_float32`; zero stays zero."""
    return F.normalize(to_float32(x), dim=-1)


def cosine(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Cosines ``[B, N, M]`` of ``x`` ``[B, N, D]`` with ``y`` ``[B, M, D]``, or with itself."""
    one = unit(x)
    return one @ (one if y is None else unit(y)).transpose(1, 2)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``[B, K, D]`` of ``x`` ``[B, N, D]`` at ``index`` ``[B, K]``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def rms_normalize(x: Tensor) -> Tensor:
    """RMS normalisation over the last dimension, as in the first layer of a decoder."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)
