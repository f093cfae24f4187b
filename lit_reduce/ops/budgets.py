"""Budget rules: how a number of tokens is divided over parts of an image, tiles or layers."""

import itertools
import math

import torch
from torch import Tensor

from lit_reduce.errors import UserError


def geometric_schedule_for_mean(shares: list[float], depth: int, tokens: int, keep: int) -> dict[int, int]:
    """Token counts by layer that shrink by a constant factor per stage, with a given mean over all layers.

    Args:
        shares: Positions of the stages as fractions of the depth; 0 is before the first layer. Stages that round to the
            same layer act once.
        depth: Number of layers.
        tokens: Visual tokens that enter the first layer.
        keep: Mean number of visual tokens over the layers, met as closely as whole numbers allow.

    Returns:
        ``{layer: tokens that remain from before this layer on}``.

    Raises:
        UserError: The layers before the first stage alone exceed the mean.
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
    """Number of contextual tokens among ``k`` tokens of VisionZip (arXiv 2412.04467).

    The paper has 30, 20 and 10 of 192, 128 and 64: 5 in 32, at least 1; none if ``k`` is 1.
    """
    return max(1, k * 5 // 32) if k > 1 else 0


def even_shares(total: int, parts: int) -> list[int]:
    """Split ``total`` into whole numbers that differ by at most 1."""
    return [(part + 1) * total // parts - part * total // parts for part in range(parts)]


def largest_remainder(weights: Tensor, total: int, caps: list[int]) -> Tensor:
    """Split ``total`` into whole shares in proportion to weights, by the largest-remainder method with caps.

    What a part at its cap cannot take goes to the others.

    Args:
        weights: ``[B, P]``, non-negative; a row of zeros counts as uniform.
        total: At most the sum of the caps.
        caps: Number of tokens of each part.

    Returns:
        ``[B, P]`` int64, each row sums to ``total``. Among equal remainders the lower index gets the token.
    """
    parts = weights.shape[-1]
    if not 0 <= total <= sum(caps):
        raise ValueError(f"parts of {caps} tokens cannot share {total}")
    wish, cap = weights.double(), weights.new_tensor(caps, dtype=torch.float64)
    # Add a tiny uniform share, so that parts without weight can take what the others have no room for.
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


def geometric_schedule(shares: list[float], depth: int, tokens: int, keep: int, after: bool = False) -> dict[int, int]:
    """Token counts by layer that shrink by a constant factor per stage and end at ``keep``.

    Args:
        shares: Positions of the stages as fractions of the depth; stages that round to the same layer act once.
        depth: Number of layers.
        tokens: Visual tokens that enter the first layer.
        keep: Visual tokens after the last stage.
        after: Act on the output of these layers, and so before the next ones, instead of on their input.

    Returns:
        ``{layer: tokens that remain from before this layer on}``.
    """
    layers = sorted({min(depth - 1, max(1, round(share * depth) + after)) for share in shares})
    part = keep / tokens
    return {layer: max(keep, round(tokens * part ** ((i + 1) / len(layers)))) for i, layer in enumerate(layers)}


def cosine_decay(depth: int, tokens: int, keep: int, whole: float = 0.85, least: float = 0.15) -> list[int]:
    """Token counts of each layer by p-MoD's progressive ratio decay, shifted to a mean of exactly ``keep``.

    Layer l of L has the ratio ``cos(pi l / (L - 1)) / 2 + 1/2 + s``: all tokens if it exceeds ``whole``, and never less
    than ``least``. With s = 0 these are the paper's counts, 53.75 % on average for 32 layers.

    For other averages we shift the cosine: s is the largest shift whose total does not exceed ``keep * depth``. The
    tokens that remain because of rounding and of the step at ``whole`` go one by one to the first layers that have
    room. Below the paper's average, ``least`` shrinks in proportion to ``keep``.

    Source: p-MoD, arXiv 2412.04449; the shift is ours.
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
    """Split ``count`` output tokens of SparseVLM into kept tokens, recycled tokens and clusters of recycled tokens.

    Of the dropped tokens ``int(0.3 dropped) + 1`` are recycled; they form ``recycled // 10 + 1`` clusters. Of 576
    tokens with 300 kept there are 9 clusters, 309 in all. The result has the largest number of kept tokens whose total
    does not exceed ``count``.

    Returns:
        Kept tokens, recycled tokens, clusters.

    Source: SparseVLM, arXiv 2410.04417.
    """
    kept = count
    while True:
        recycled = min(int(0.3 * (tokens - kept)) + 1, tokens - kept)
        clusters = min(recycled // 10 + 1, recycled)
        if kept + clusters <= count or kept == 0:
            return kept, recycled, count - kept
        kept -= 1
