"""Greedy selectors: each token is selected given those before it, for all images of a batch in the same k steps.

One step costs O(N) (farthest point, max-sum), O(N k) (DPP) or O(M N) (coverage of M items). All return ascending
indices ``[B, k]``; of equal candidates the lower index wins, and no token is selected twice.
"""

import torch
from torch import Tensor

from lit_reduce.ops.selectors import true_indices
from lit_reduce.ops.similarity import cosine

CACHED = 1 << 18  # numbers that the cache of a processor core holds
LAZY = 32  # tokens that are evaluated again at each step of `coverage`


def farthest_point(features: Tensor, k: int) -> Tensor:
    """Farthest-point selection: maximise the smallest cosine distance between selected tokens.

    The first token is the one farthest from its nearest neighbour. The official code of DivPrune can select one of
    several duplicates again and then returns fewer than ``k`` tokens; this function never does.

    Args:
        features: ``[B, N, D]``.
        k: Between 1 and N.

    Source: max-min diversity problem of DivPrune, arXiv 2503.02175.
    """
    distance = 1 - cosine(features.detach())
    rows = torch.arange(len(distance), device=distance.device)
    nearest = distance.diagonal_scatter(torch.full_like(distance[..., 0], torch.inf), dim1=1, dim2=2).amin(-1)
    chosen = torch.zeros_like(nearest, dtype=torch.bool)
    for step in range(k):
        pick = nearest.masked_fill(chosen, -torch.inf).argmax(-1)
        chosen[rows, pick] = True
        # Neighbour distances decide the first pick only, distances to selected tokens all later ones.
        nearest = distance[rows, pick] if step == 0 else torch.minimum(nearest, distance[rows, pick])
    return true_indices(chosen, k)


def max_sum(features: Tensor, first: Tensor, k: int) -> Tensor:
    """Max-sum diversity: from a first token on, add the token with the smallest summed cosine to those selected.

    Args:
        features: ``[B, N, D]``.
        first: ``[B]``, index of the first token.
        k: Between 1 and N.

    Source: ToDRE, arXiv 2505.18757.
    """
    similarity = cosine(features.detach())
    rows = torch.arange(len(similarity), device=similarity.device)
    closeness = torch.zeros_like(similarity[..., 0])
    chosen, pick = torch.zeros_like(closeness, dtype=torch.bool), first
    for _ in range(k):
        chosen[rows, pick] = True
        closeness = closeness + similarity[rows, pick]
        pick = closeness.masked_fill(chosen, torch.inf).argmin(-1)
    return true_indices(chosen, k)


def coverage(table: Tensor, k: int, weight: Tensor | None = None, bonus: Tensor | None = None) -> Tensor:
    """Greedy facility location: add the token that raises ``sum_i max_(j selected) table_ij`` most.

    MMTok (arXiv 2508.18264) covers text and vision rows, SCOPE (arXiv 2510.24214) multiplies the gains by saliency,
    CATP adds a linear bonus. The coverage of every row starts at 0.

    Args:
        table: ``[B, M, N]``, how well token j covers item i; negative entries count as 0.
        k: Between 1 and N.
        weight: ``[B, N]``, factor on the gain of each token.
        bonus: ``[B, N]``, added to the gain of each token.
    """
    table = table.detach()
    weight = torch.ones_like(table[:, 0]) if weight is None else weight
    bonus = torch.zeros_like(table[:, 0]) if bonus is None else bonus
    if table.device.type == "cpu":
        return torch.stack([_cover_lazily(*image, k) for image in zip(table, weight, bonus, strict=True)])
    bonus, covered, picks = bonus.to(table.dtype, copy=True), torch.zeros_like(table[..., :1]), []
    for _ in range(k):
        gain = (table - covered).clamp_min_(0).sum(1)
        picks.append(torch.addcmul(bonus, gain, weight).argmax(-1, keepdim=True))
        bonus.scatter_(1, picks[-1], -torch.inf)
        covered = torch.maximum(covered, table.gather(2, picks[-1][:, None].expand(-1, table.shape[1], -1)))
    return torch.cat(picks, 1).sort(-1).values


def _cover_lazily(table: Tensor, weight: Tensor, bonus: Tensor, k: int) -> Tensor:
    """`coverage` of the table of one image ``[M, N]`` with few evaluations, for processors.

    Gains never grow, so those of earlier steps are upper bounds: usually a few tokens are evaluated again, and the best
    of them exceeds the bounds of all others (lazy greedy, Minoux 1978). Otherwise all are evaluated.
    """
    columns, bonus = table.T.contiguous(), bonus.to(table.dtype, copy=True)
    covered = torch.zeros_like(columns[0])

    def value(tokens: Tensor) -> Tensor:
        gain = columns.index_select(0, tokens).sub_(covered).clamp_min_(0).sum(1)
        return torch.addcmul(bonus.index_select(0, tokens), gain, weight.index_select(0, tokens))

    parts = torch.arange(len(columns)).split(max(1, CACHED // len(covered)))
    bounds, picks = torch.cat([value(part) for part in parts]), []
    few = min(LAZY, len(columns) - 1)
    for _ in range(k):
        high, order = bounds.topk(few + 1)
        bounds.index_copy_(0, order[:few], value(order[:few]))
        pick = int(bounds.argmax())
        if few and not bounds[pick] > high[few]:
            bounds = torch.cat([value(part) for part in parts])
            pick = int(bounds.argmax())
        picks.append(pick)
        bonus[pick] = bounds[pick] = -torch.inf
        torch.maximum(covered, columns[pick], out=covered)
    return torch.tensor(sorted(picks))


def dpp_greedy(kernel: Tensor, k: int) -> Tensor:
    """Greedy MAP inference of a determinantal point process: add the token that raises the determinant most.

    Once the rank of the kernel is used up, no token raises the determinant; the remaining ones are selected by the
    diagonal of the kernel, so that rounding errors decide nothing.

    Args:
        kernel: ``[B, N, N]``, positive semi-definite.
        k: Between 1 and N.

    Source: Chen et al., arXiv 1709.05135, algorithm 1, as used by CDPruner (arXiv 2506.10967).
    """
    kernel = kernel.detach()
    gain = kernel.diagonal(dim1=1, dim2=2).clone()  # its own memory: a diagonal has a stride of N + 1
    floor, last = 1e-5 * gain, gain - gain.amax(-1, keepdim=True) - 1
    directions, picks = kernel.new_zeros(len(kernel), k, kernel.shape[-1]), []
    rows = torch.arange(len(kernel), device=kernel.device)
    for step in range(k):
        pick = torch.where(gain > floor, gain, last).argmax(-1, keepdim=True)
        best, past = gain.gather(1, pick), directions[:, :step]
        scale = best.masked_fill_(best <= floor.gather(1, pick), torch.inf).rsqrt()  # 0 beyond the rank
        seen = past[rows, :, pick[:, 0]][:, None]
        ahead = torch.baddbmm(kernel[rows, pick[:, 0]][:, None], seen, past, alpha=-1)[:, 0].mul_(scale)
        directions[:, step] = ahead
        gain = gain.addcmul_(ahead, ahead, value=-1).scatter_(1, pick, -torch.inf)
        last = last.scatter_(1, pick, -torch.inf)
        picks.append(pick)
    return torch.cat(picks, 1).sort(-1).values
