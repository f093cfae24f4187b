"""Budget rules: how a number of tokens is split over parts, tiles or layers."""

import itertools
import math

import torch
from torch import Tensor

from lit_reduce.errors import UserError


def geometric_schedule_for_mean(shares: list[float], depth: int, tokens: int, keep: int) -> dict[int, int]:
    """Tokens that stay from before each of some layers on, each time the same part, so that layers see ``keep``.

    Args:
        shares: Where, as parts of the depth; 0 is before the first layer, layers that coincide act once.
        depth: Layers.
        tokens: Visual tokens at first.
        keep: Visual tokens that a layer sees on average, to the nearest that whole numbers allow.

    Raises:
        UserError: the layers before the first of these see more than that already.
    """
    layers = sorted({min(depth - 1, max(1, round(share * depth))) if share else 0 for share in shares})
    least = math.ceil((tokens * layers[0] + depth - layers[0]) / depth)
    if keep < least:
        raise UserError(
            f"keep={keep}: the layers before layer {layers[0]} see all {tokens} tokens, so the mean over {depth} "
            f"layers is {least} or more; give that, or act earlier"
        )
    spans = [after - before for before, after in itertools.pairwise([*layers, depth])]
    low, high = 0.0, 1.0
    for _ in range(50):
        part = (low + high) / 2
        total = sum(max(1, tokens * part ** (i + 1)) * span for i, span in enumerate(spans))
        low, high = (part, high) if tokens * layers[0] + total <= keep * depth else (low, part)
    return {layer: max(1, round(tokens * low ** (i + 1))) for i, layer in enumerate(layers)}


def contextual_count(k: int) -> int:
    """VisionZip's contextual part of ``k`` tokens: 5 in 32, that is 30, 20 and 10 of 192, 128 and 64, at least 1."""
    return max(1, k * 5 // 32) if k > 1 else 0


def even_shares(total: int, parts: int) -> list[int]:
    """Whole numbers that sum to ``total`` and differ by at most 1."""
    return [(part + 1) * total // parts - part * total // parts for part in range(parts)]


def largest_remainder(weights: Tensor, total: int, caps: list[int]) -> Tensor:
    """Whole shares of ``total`` in proportion to weights, none above its cap; what a full part cannot take, others do.

    Args:
        weights: ``[B, P]``, not negative; a row of zeros counts as even.
        total: At most the sum of the caps.
        caps: Tokens that each part has.

    Returns:
        ``[B, P]`` int64, each row summing to ``total``; of equal remainders the lower index is served first.
    """
    parts = weights.shape[-1]
    if not 0 <= total <= sum(caps):
        raise ValueError(f"parts of {caps} tokens cannot share {total}")
    wish, cap = weights.double(), weights.new_tensor(caps, dtype=torch.float64)
    # A trace of evenness, so that parts without weight can take what the others have no room for.
    wish = wish / wish.sum(-1, keepdim=True).clamp_min(1e-30) + 1e-12
    share = torch.zeros_like(wish)
    for _ in range(parts):  # each round fills at least one part or gives everything away
        open_ = torch.where(share < cap, wish, 0)
        left = total - share.sum(-1, keepdim=True)
        share = (share + left * open_ / open_.sum(-1, keepdim=True).clamp_min(1e-30)).minimum(cap)
    # Rounded to a billionth first: 3 must not become 2 because it came out as 2.9999999999.
    whole = (share + 1e-9).floor()
    missing = total - whole.sum(-1, keepdim=True)
    rest = torch.where(whole < cap, share - whole, -1)
    order = rest.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
    return (whole + (order < missing)).long()


def geometric_schedule(shares: list[float], depth: int, tokens: int, keep: int) -> dict[int, int]:
    """Tokens that stay from before each of some layers on, each time the same part, so that ``keep`` are left at last.

    Args:
        shares: Where, as parts of the depth; layers that coincide act once.
        depth: Layers.
        tokens: Visual tokens at first.
        keep: Visual tokens at last.
    """
    layers = sorted({min(depth - 1, max(1, round(share * depth))) for share in shares})
    part = keep / tokens
    return {layer: max(keep, round(tokens * part ** ((i + 1) / len(layers)))) for i, layer in enumerate(layers)}


def cosine_decay(depth: int, tokens: int, keep: int, whole: float = 0.85, least: float = 0.15) -> list[int]:
    """p-MoD's progressive ratio decay (arXiv 2412.04449), moved so that layers see ``keep`` tokens on average, exactly.

    Layer l of L gets the ratio ``cos(pi l / (L - 1)) / 2 + 1/2 + s``: all tokens where that is above ``whole``, never
    less than ``least``. With s = 0 these are the paper's layers, 53.75 % on average of 32. Other averages move the
    cosine up or down (our reading): s is the largest with which no more than ``keep`` are seen, and the tokens that
    rounding and the step at ``whole`` leave over go one by one to the layers that have room, the first ones first.
    Below the paper's average its least ratio shrinks with ``keep``.
    """

    def counts(shift: float, low: float) -> list[int]:
        ratios = [math.cos(math.pi * layer / max(1, depth - 1)) / 2 + 0.5 + shift for layer in range(depth)]
        return [tokens if r > whole else max(1, int(max(low, r) * tokens + 1e-9)) for r in ratios]

    own, total = sum(counts(0, least)), keep * depth
    least *= min(1, total / own)
    low, high = -1.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle, least)) <= total else (low, middle)
    found = counts(low, least)
    while sum(found) < total:
        room = [layer for layer in range(depth) if found[layer] < tokens]
        for layer in room[: total - sum(found)]:
            found[layer] += 1
    return found


def recycled_split(tokens: int, count: int) -> tuple[int, int, int]:
    """How SparseVLM (arXiv 2410.04417) makes ``count`` of ``tokens``: kept, recycled, and the clusters of the latter.

    ``int(0.3 dropped) + 1`` of the dropped are recycled, into a tenth of that and one more; of 576 tokens 300 kept give
    9 clusters, so 309. The largest number kept that leaves no more than ``count`` in all.
    """
    kept = count
    while True:
        recycled = min(int(0.3 * (tokens - kept)) + 1, tokens - kept)
        clusters = min(recycled // 10 + 1, recycled)
        if kept + clusters <= count or kept == 0:
            return kept, recycled, count - kept
        kept -= 1
