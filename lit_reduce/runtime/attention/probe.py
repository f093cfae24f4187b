"""Reads a few rows of one attention call without building the map or leaving the fast kernels.

A probe gives one attention module a view of its config with another implementation name. The function behind that name
sees queries and keys (after rotary embedding and cache), computes only what is asked for, and hands the call on to
the module's own implementation, so the module's output does not change by a bit.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

Rows = slice | Tensor
CLS = slice(0, 1)
LAST = slice(-1, None)
CHUNK = 1024  # query rows at a time where all of them are wanted


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function.

    Attributes:
        q: ``[B, H, Q, d]`` queries.
        k: ``[B, G, K, d]`` keys of G groups of heads.
        v: ``[B, G, K, d]`` values.
        mask: What the kernel got: None, ``[B, K]``, or a bool or additive ``[B, 1, Q, K]``.
        scaling: Factor on the dot products.
        causal: Whether a query sees only what stands before it, where the mask does not say.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scaling: float
    causal: bool

    def rows(self, asked: Rows) -> Tensor:
        """Probabilities ``[B, H, R, K]`` in float32 of some queries, see `AttentionProbe`."""
        return self.logits(asked).softmax(-1)

    def logits(self, asked: Rows) -> Tensor:
        """The logits ``[B, H, R, K]`` of some queries in float32, what they do not see masked."""
        count, keys = self.q.shape[2], self.k.shape[2]
        logits = _scores(_rows(self.q, asked), self.k) * self.scaling
        mask = self.mask
        if mask is not None and mask.ndim == 2:  # flash attention: which keys are not padding
            mask = mask[:, None, None].bool()
        if self.causal and (mask is None or mask.shape[2] == 1):
            index = _rows(torch.arange(count, device=self.q.device)[None, None, :, None], asked) + keys - count
            logits = logits.masked_fill(torch.arange(keys, device=self.q.device) > index, -torch.inf)
        if mask is not None:
            seen = (mask if mask.shape[2] == 1 else _rows(mask, asked))[..., :keys]
            logits = logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen
        return logits

    def received(self) -> Tensor:
        """Attention ``[B, K]`` that each token receives, mean over heads and over the queries that see it, CLS too."""
        total = seen = torch.zeros((), device=self.q.device)
        for start in range(0, self.q.shape[2], CHUNK):
            logits = self.logits(slice(start, min(start + CHUNK, self.q.shape[2])))
            hidden = logits[:, 0] < torch.finfo(self.q.dtype).min / 2  # masks are -inf or the dtype's lowest value
            total, seen = total + logits.softmax(-1).mean(1).sum(1), seen + (~hidden).sum(1)
        return total / seen.clamp(min=1)


class AttentionProbe:
    """Records what every call of one attention module shows while the ``with`` block lasts.

    Attributes:
        rows: What was read at each call; by default ``[B, H, R, keys]`` float32 probabilities.
    """

    def __init__(self, attention: nn.Module, rows: Rows | Callable[[AttentionCall], Any] = CLS) -> None:
        """Prepare a probe.

        Args:
            attention: A transformers attention module.
            rows: Which queries to read: `CLS` (the first), `LAST`, a slice, a 1-D tensor of indices, or a ``[B, R]``
                tensor when they differ between samples; or a function that reads what it likes from a `AttentionCall`.
        """
        self.attention: Any = attention
        self.asked = rows
        self.rows: list[Any] = []

    def __enter__(self) -> "AttentionProbe":
        self.attention.config = View(self.attention.config, "probe", probe=self)
        return self

    def __exit__(self, *_: object) -> None:
        # Probes on one module are nested, so the view to take away is always the outermost.
        self.attention.config = self.attention.config._base

    @torch.no_grad()
    def see(self, call: AttentionCall) -> None:
        """Read one call."""
        self.rows.append(self.asked(call) if callable(self.asked) else call.rows(self.asked))

    def change(self, out: Tensor) -> Tensor:
        """What the module puts out ``[B, Q, H, d]``; a probe that does more than look returns something else."""
        return out


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


class View:
    """A live view of a config that differs only in its attention implementation, and carries what that needs.

    Args:
        base: The config.
        kernel: The name, behind "lit_reduce_" or "lit_reduce_flash_": models branch on "flash" in it, so it stays.
        held: Attributes of the view.
    """

    def __init__(self, base: Any, kernel: str, **held: Any) -> None:
        self.__dict__.update(_base=base, _kernel=kernel, **held)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._base, name)

    @property
    def _attn_implementation(self) -> str:
        flash = "flash_" if "flash" in (self._base._attn_implementation or "") else ""
        return f"lit_reduce_{flash}{self._kernel}"


def _probed(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    view = module.config
    scaling, causal = kwargs.get("scaling"), kwargs.get("is_causal")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if causal is None else causal
    lengths = kwargs.get("cu_seq_lens_q")  # flash attention over several images in one row
    seen = key, value  # of a static cache those at the end are not written yet
    if causal and attention_mask is None and query.shape[2] > 1 and not is_flash_attention_requested(view._base):
        seen = (
            key[:, :, : query.shape[2]],
            value[:, :, : query.shape[2]],
        )
    cuts = [query.shape[2]] if lengths is None else lengths.diff().tolist()
    for q, k, v in zip(*(x.split(cuts, 2) if len(cuts) > 1 else [x] for x in (query, *seen)), strict=True):
        view.probe.see(AttentionCall(q, k, v, attention_mask, scaling, causal))
    module.config = view._base  # flash attention reads its kernel's name from here
    try:
        out, weights = attend(module, query, key, value, attention_mask, **kwargs)
        return view.probe.change(out), weights
    finally:
        module.config = view


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that the module's config names."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    forward = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    result: tuple[Tensor, Tensor | None] = forward(module, query, key, value, attention_mask, **kwargs)
    return result


AttentionInterface.register("lit_reduce_probe", _probed)
AttentionInterface.register("lit_reduce_flash_probe", _probed)
