"""Distillation losses against the teacher's attention and the teacher's answers; each is a mean over rows."""

import torch
from torch import Tensor


def listwise(scores: Tensor, guide: Tensor) -> Tensor:
    """KL(guide || softmax(scores)), with ``scores`` and ``guide`` ``[B, N]`` and each row of the guide summing to 1."""
    guide = guide.float()
    gap = guide * (guide.clamp_min(1e-9).log() - scores.float().log_softmax(-1))
    return gap.sum(-1).mean()


def hinge(scores: Tensor, guide: Tensor, k: int, margin: float = 1.0) -> Tensor:
    """The structured hinge between the k best by score and the k best by guide, ``[B, N]`` each.

    ``(sum of the k largest (s_j + margin * [j not in G]) - sum over G of s_j) / k`` with G the guide's top k; zero when
    every token of G leads every other by the margin. Our reading of top-K structured supervision.
    """
    scores = scores.float()
    best = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, guide.topk(k, dim=-1).indices, True)
    raised = (scores + margin * ~best).topk(k, dim=-1).values.sum(-1)
    return ((raised - (scores * best).sum(-1)) / k).mean()


def reading(made: Tensor, features: Tensor, assignment: Tensor, guide: Tensor) -> Tensor:
    """Distance between new tokens and the attention-weighted mean of the tokens merged into each; our design.

    The target of token k is the mean of its members, weighted by the guide; its squared distance counts by the guide's
    mass in k. In units of the features' mean square.

    Args:
        made: ``[B, K, D]``.
        features: ``[B, N, D]`` before reduction.
        assignment: ``[B, N]``, which of the K tokens each one went into; -1 for none, which counts nowhere.
        guide: ``[B, N]``, each row summing to 1.
    """
    weight = guide.float() * (assignment >= 0)
    owner = assignment.clamp_min(0)
    mass = torch.zeros_like(made[..., 0], dtype=torch.float32).scatter_add(1, owner, weight)
    share = weight / mass.gather(1, owner).clamp_min(1e-12)
    index = owner[..., None].expand_as(features)
    target = torch.zeros_like(made, dtype=torch.float32).scatter_add(1, index, share[..., None] * features.float())
    gap = (made.float() - target).square().mean(-1)
    return ((mass * gap).sum(-1) / features.float().square().mean((1, 2)).clamp_min(1e-12)).mean()


def answer_kl(logits: Tensor, top: Tensor, top_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of each answer token ``[A]``.

    Args:
        logits: The student's ``[A, V]``.
        top: The teacher's largest log-probabilities ``[A, k]``; what is left is one bucket.
        top_ids: Their vocabulary ids ``[A, k]``.
        temperature: Softens both sides; the result is multiplied by its square. The bucket stays one entry.
    """
    student = logits.float().log_softmax(-1).gather(-1, top_ids.long())
    teacher, student = _with_rest(top.float()), _with_rest(student)
    teacher = (teacher / temperature).log_softmax(-1)
    student = (student / temperature).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1) * temperature**2


def _with_rest(logp: Tensor) -> Tensor:
    """Appends the log-probability of everything that is not listed."""
    rest = (1 - logp.exp().sum(-1, keepdim=True)).clamp_min(1e-6).log()
    return torch.cat([logp, rest], -1)


def row_mean(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Means within each row, then over rows: ``values`` and ``rows`` ``[A]``, so that long answers weigh no more.

    It also makes the loss of a batch the mean of the losses of its halves, as training on several devices needs.
    """
    sums = torch.zeros(count, device=values.device).index_add(0, rows, values)
    counts = torch.zeros(count, device=values.device).index_add(0, rows, torch.ones_like(values))
    return (sums / counts.clamp_min(1)).mean()
