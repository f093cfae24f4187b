"""One call of a reducer, wherever it acts: on its own device and in its own precision, its answer checked."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from lit_reduce.reducer import Reducer
from lit_reduce.tokens import Reduction, VisualTokens


def call_reducer(reducer: Reducer, tokens: VisualTokens, keep: int) -> Reduction:
    """The reduction of ``tokens`` to ``keep``.

    Raises:
        ValueError: the reducer's answer breaks the rules of `Reduction`.
    """
    reduction: Reduction = reducer(_matched(reducer, tokens), keep)
    _check(reducer, reduction, tokens.count)
    return reduction


def kept_mask(reduction: Reduction, count: int) -> Tensor:
    """``[B, N]`` bool, true at the kept indices."""
    ones = torch.ones_like(reduction.kept_indices) if reduction.valid is None else reduction.valid.long()
    return ones.new_zeros(len(ones), count).scatter_add(1, reduction.kept_indices, ones) > 0


def now(x: Tensor) -> float:
    """Seconds on a clock, after the device of ``x`` has done its work."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _matched(reducer: Reducer, tokens: VisualTokens) -> VisualTokens:
    """Move a reducer to the tokens' device, and cast the tokens to its precision: plug-ins keep their own dtype."""
    weight = next(reducer.parameters(), None)
    if weight is None:
        return tokens
    x = tokens.features
    if weight.device != x.device:
        reducer.to(x.device)
    if weight.dtype == x.dtype:
        return tokens
    signals = {k: v.to(weight.dtype) if v.is_floating_point() else v for k, v in tokens.signals.items()}
    return replace(tokens, features=x.to(weight.dtype), signals=signals)


def _check(reducer: Reducer, reduction: Reduction, count: int) -> None:
    """Refuse indices that would put tokens at the wrong positions in silence, as a third party's reducer may return."""
    a, valid = reduction.kept_indices, reduction.valid
    real = torch.ones_like(a, dtype=torch.bool) if valid is None else valid
    rising = (a[:, 1:] > a[:, :-1]) | ~real[:, 1:]
    trailing = real[:, :-1] | ~real[:, 1:]
    inside = ((a >= 0) & (a < count)) | ~real
    if not bool(rising.all() & trailing.all() & inside.all() & real.any(1).all()):
        raise ValueError(f"reducer '{reducer.name}' must return ascending anchors below {count}, the invalid ones last")
