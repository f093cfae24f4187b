"""Reads a few rows of one attention map without ever building the map or leaving the fast kernels.

A tap gives one attention module a view of its config with another implementation name. The function behind that name
sees queries and keys (after rotary embedding and cache), computes only the rows asked for, and hands the call on to
the module's own implementation, so the module's output does not change by a bit.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Rows = slice | Tensor
CLS = slice(0, 1)
LAST = slice(-1, None)


class Tap:
    """Records attention rows of one module while the ``with`` block lasts.

    Attributes:
        rows: One ``[B, H, R, keys]`` float32 tensor of probabilities for each call of the module.
    """

    def __init__(self, attention: nn.Module, rows: Rows = CLS) -> None:
        """Prepare a tap.

        Args:
            attention: A transformers attention module.
            rows: Which queries to read: `CLS` (the first), `LAST`, a slice, a 1-D tensor of indices, or a ``[B, R]``
                tensor when they differ between samples.
        """
        self.attention: Any = attention
        self.asked = rows
        self.rows: list[Tensor] = []

    def __enter__(self) -> "Tap":
        self.attention.config = _Tapped(self.attention.config, self)
        return self

    def __exit__(self, *_: object) -> None:
        self.attention.config = self.attention.config._base

    @torch.no_grad()
    def see(self, module: Any, q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, causal: bool | None) -> None:
        """Compute the rows for one call with queries ``[B, H, Q, d]`` and keys ``[B, G, K, d]``."""
        count, keys = q.shape[2], k.shape[2]
        causal = getattr(module, "is_causal", True) if causal is None else causal
        picked = _rows(q, self.asked)
        if mask is not None and mask.ndim == 2:  # flash attention: which keys are not padding
            mask = mask[:, None, None].bool()
        logits = _scores(picked, k) * scaling
        if causal and (mask is None or mask.shape[2] == 1):
            index = _rows(torch.arange(count, device=q.device)[None, None, :, None], self.asked) + keys - count
            logits = logits.masked_fill(torch.arange(keys, device=q.device) > index, -torch.inf)
        if mask is not None:
            seen = (mask if mask.shape[2] == 1 else _rows(mask, self.asked))[..., :keys]
            logits = logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen
        self.rows.append(logits.softmax(-1))


def _rows(x: Tensor, asked: Rows) -> Tensor:
    """Rows of ``[B or 1, H, Q, n]``: the same of every sample, or those of ``asked`` ``[B, R]``."""
    if isinstance(asked, slice) or asked.ndim == 1:
        return x[:, :, asked]
    index = asked[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.expand(len(asked), -1, -1, -1).gather(2, index)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Dot products ``[B, H, R, K]`` in float32; grouped heads share their keys without a copy."""
    batch, heads, rows, width = q.shape
    groups = k.shape[1]
    folded = q.reshape(batch, groups, heads // groups * rows, width)
    return (folded @ k.transpose(2, 3)).reshape(batch, heads, rows, -1).float()


class _Tapped:
    """A live view of a config that differs only in the name of the attention implementation."""

    def __init__(self, base: Any, tap: Tap) -> None:
        self.__dict__.update(_base=base, _tap=tap)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._base, name)

    @property
    def _attn_implementation(self) -> str:
        # Models branch on "flash" in the name, so it must stay in there.
        return "lit_reduce_flash_tap" if "flash" in (self._base._attn_implementation or "") else "lit_reduce_tap"


def _tapped(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    view = module.config
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    view._tap.see(module, query, key, attention_mask, scaling, kwargs.get("is_causal"))
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    forward = ALL_ATTENTION_FUNCTIONS.get_interface(view._base._attn_implementation, eager)
    module.config = view._base  # flash attention reads its kernel's name from here
    try:
        result: tuple[Tensor, Tensor | None] = forward(module, query, key, value, attention_mask, **kwargs)
        return result
    finally:
        module.config = view


AttentionInterface.register("lit_reduce_tap", _tapped)
AttentionInterface.register("lit_reduce_flash_tap", _tapped)
