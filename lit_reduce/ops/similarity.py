"""Similarity of tokens: what diversity, coverage and merging are measured in."""

import torch
from torch import Tensor
from torch.nn import functional as F


def to_float32(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is already that: half precision would decide near ties by rounding."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """Vectors of length one along the last dimension, see `to_float32`; zero stays zero."""
    return F.normalize(to_float32(x), dim=-1)


def cosine(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Cosines ``[B, N, M]`` of ``x`` ``[B, N, D]`` with ``y`` ``[B, M, D]``, or with itself."""
    one = unit(x)
    return one @ (one if y is None else unit(y)).transpose(1, 2)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """The tokens ``[B, K, D]`` of ``x`` ``[B, N, D]`` at ``index`` ``[B, K]``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def rms_normalize(x: Tensor) -> Tensor:
    """Tokens of size 1, as a decoder's first norm makes them; towers and projectors differ by orders of magnitude."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)
