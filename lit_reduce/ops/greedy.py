"""Greedy selectors: each token is selected given those before it, for all images of a batch in the same k steps.

One step costs O(N) (farthest point, max-sum), O(N k) (DPP) or O(M N) (coverage of M items). All return ascending
indices ``[B, k]``; of equal candidates the lower index wins, and no token is selected twice.
"""

import torch
from torch import Tensor

from lit_reduce.ops.selectors import true_indices
from lit_reduce.ops.similarity import cosine


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
    table = table.detach().transpose(1, 2).contiguous()  # [B, N, M]: sums run along memory, a pick is one row
    rows = torch.arange(len(table), device=table.device)
    covered = torch.zeros_like(table[:, :1])
    chosen = torch.zeros_like(table[..., 0], dtype=torch.bool)
    for _ in range(k):
        gain = (table - covered).clamp_min_(0).sum(-1)
        gain = gain if weight is None else gain * weight
        gain = gain if bonus is None else gain + bonus
        pick = gain.masked_fill(chosen, -torch.inf).argmax(-1)
        chosen[rows, pick] = True
        covered = torch.maximum(covered, table[rows, pick, None])
    return true_indices(chosen, k)


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
    quality = kernel.diagonal(dim1=1, dim2=2)
    rows = torch.arange(len(kernel), device=kernel.device)
    last = quality - quality.amax(-1, keepdim=True) - 1
    gain, directions = quality, kernel.new_zeros(len(kernel), k, kernel.shape[-1])
    chosen = torch.zeros_like(gain, dtype=torch.bool)
    for step in range(k):
        useful = gain > 1e-5 * quality
        pick = torch.where(useful, gain, last).masked_fill(chosen, -torch.inf).argmax(-1)
        chosen[rows, pick] = True
        past = directions[:, :step]
        seen = (past[rows, :, pick][:, None] @ past)[:, 0]
        ahead = (kernel[rows, pick] - seen) / gain[rows, pick].clamp_min(1e-12).sqrt()[:, None]
        directions[:, step] = ahead * useful[rows, pick][:, None]
        gain = gain - directions[:, step].square()
    return true_indices(chosen, k)
