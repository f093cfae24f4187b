"""Density-peak clustering of tokens."""

import torch
from torch import Tensor

from lit_reduce.ops.selectors import ranks, topk_sorted
from lit_reduce.ops.similarity import cosine, to_float32


def dpc_knn(features: Tensor, clusters: int, neighbours: int | None = None) -> tuple[Tensor, Tensor]:
    """Density-peak clustering with k nearest neighbours (DPC-KNN).

    The density of a token is ``exp(-mean of its smallest squared distances)``; distances are divided by ``sqrt(D)`` and
    include the token itself. Cluster centres have the largest product of density and distance to the nearest denser
    token. Among equal densities the lower index counts as denser; the official code of SparseVLM breaks ties with
    random noise.

    Args:
        features: ``[B, N, D]``.
        clusters: Between 1 and N.
        neighbours: Number of distances in the density; SparseVLM takes ``clusters``.

    Returns:
        Cluster centres ``[B, clusters]``, ascending, and the cluster of each token ``[B, N]``; a centre belongs to
        itself.

    Source: as used by SparseVLM, arXiv 2410.04417.
    """
    x = to_float32(features.detach())
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    near = distance.topk(min(neighbours or clusters, x.shape[1]), largest=False).values
    density = (-near.square().mean(-1)).exp()
    index = torch.arange(x.shape[1], device=x.device)
    mine, other = density[..., None], density[:, None]
    denser = (other > mine) | ((other == mine) & (index < index[:, None]))
    isolation = distance.masked_fill(~denser, torch.inf).amin(-1)
    isolation = torch.where(isolation.isinf(), distance.amax((1, 2))[:, None], isolation)
    peaks = topk_sorted(density * isolation, clusters)
    assignment = distance.gather(1, peaks[..., None].expand(-1, -1, x.shape[1])).argmin(1)
    return peaks, assignment.scatter(1, peaks, torch.arange(clusters, device=x.device).expand_as(peaks))


def distinctive_tokens(features: Tensor, among: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of high density that resemble no denser token, and the assignment of all candidates to them.

    The density of a token is the sum of its cosines with all candidates. Its score is the density times one minus the
    largest cosine to a denser candidate (0 for the densest). Among equal densities the lower index counts as denser.

    Args:
        features: ``[B, N, D]``.
        among: ``[B, N]`` bool, the candidates.
        counts: ``[B]``, number of tokens to select, at most the candidates of the row.

    Returns:
        The selected tokens ``[B, N]`` bool, and for each candidate the index of the selected token most similar to it
        ``[B, N]``, -1 for other tokens.

    Source: RESTORE, arXiv 2606.01711.
    """
    similarity = cosine(features.detach())
    density = (similarity * among[:, None]).sum(-1).masked_fill(~among, -torch.inf)
    index = torch.arange(features.shape[1], device=features.device)
    mine, other = density[..., None], density[:, None]
    denser = (other > mine) | ((other == mine) & (index < index[:, None]))
    alike = similarity.masked_fill(~(denser & among[:, None]), -torch.inf).amax(-1)
    score = density * (1 - torch.where(alike.isinf(), 0, alike))
    kept_indices = (ranks(score.masked_fill(~among, -torch.inf)) < counts[:, None]) & among
    assignment = similarity.masked_fill(~kept_indices[:, None], -torch.inf).argmax(-1)
    return kept_indices, torch.where(kept_indices, index, assignment).masked_fill(~among, -1)
