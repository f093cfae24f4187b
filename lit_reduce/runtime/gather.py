"""Gathering and padding of token rows, for everything in the runtime that shortens a batch of sequences."""

from torch import Tensor


def gather_rows(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries ``index`` ``[B, n]`` of ``x`` along ``dim``; the first axis of ``x`` is B, or 1 for all samples."""
    view, full = [1] * x.ndim, list(x.shape)
    view[0], view[dim] = index.shape
    full[0], full[dim] = index.shape
    return x.expand(len(index), *x.shape[1:]).gather(dim, index.view(view).expand(full))


def gather_filled(x: Tensor, index: Tensor, valid: Tensor, fill: int) -> Tensor:
    """Entries ``index`` ``[B, n]`` of ``x`` ``[B, L]``, with ``fill`` where ``valid`` ``[B, n]`` is false."""
    return x.gather(1, index).masked_fill(~valid, fill)


def gather_positions(positions: Tensor, index: Tensor) -> Tensor:
    """Position ids ``[..., B, n]`` of the columns ``index`` ``[B, n]`` of ``positions`` ``[..., B, L]``."""
    return positions.gather(-1, index.expand(*positions.shape[:-1], -1))


def left_padded(keep: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The kept columns of ``keep`` ``[B, n]`` bool in their order, padded on the left to the longest sample.

    Returns:
        Columns ``[B, m]``, which of them are real ``[B, m]``, and whether any is not.
    """
    counts = keep.sum(1)
    longest, shortest = int(counts.max()), int(counts.min())
    order = keep.int().argsort(dim=1, stable=True)[:, keep.shape[1] - longest :]
    return order, keep.gather(1, order), longest != shortest


def right_padded(keep: Tensor) -> tuple[Tensor, Tensor]:
    """`left_padded` with the padding on the right: columns ``[B, m]``, and which of them are real."""
    order = (~keep).int().argsort(dim=1, stable=True)[:, : int(keep.sum(1).max())]
    return order, keep.gather(1, order)
