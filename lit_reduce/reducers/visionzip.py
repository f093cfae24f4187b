"""VisionZip: dominant tokens by attention, and a few contextual ones that take in the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_reduce.ops.budgets import contextual_count
from lit_reduce.ops.mergers import merge_mean, merge_sum, nearest, to_assignment
from lit_reduce.ops.selectors import ranks, true_indices
from lit_reduce.ops.similarity import gather_tokens, to_float32
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class VisionZipConfig(ReducerConfig):
    """Settings of `VisionZip`."""

    heads: int = option(1, "heads to average keys over before comparing (CLIP-L has 16)", min=1)
    parity: str = option(
        "paper",
        "official adds the mean of what a contextual token takes in to it: up to twice as long",
        choices=("paper", "official"),
    )


@register
class VisionZip(Reducer):
    """The most attended tokens stay; targets at an even stride of the rest take in the others by similarity of keys.

    Of 192, 128 and 64 tokens 30, 20 and 10 are contextual. Merging projected tokens is our reading: the paper merges
    before the projector, where the CLS token stays too, one of the dominant. By default a contextual token is the true
    mean of its members; ``parity="official"`` adds instead. Keys are compared with all heads side by side; ``heads``
    gives the mean over heads that the official code takes.
    """

    name = "visionzip"
    kind = "resample"
    signals = frozenset({"cls", "keys"})
    paper = "VisionZip, arXiv 2412.04467"
    config_class = VisionZipConfig

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Tokens in raster order, a contextual one at the place of its target."""
        keys = to_float32(tokens.signal("keys")).unflatten(-1, (self.config.heads, -1)).mean(2)
        return dominant_and_contextual(
            tokens.features, tokens.signal("cls").float(), keys, keep, added=self.config.parity == "official"
        )


def dominant_and_contextual(x: Tensor, attention: Tensor, metric: Tensor, keep: int, added: bool = False) -> Reduction:
    """The most attended tokens, and even targets among the rest that take in the others.

    Args:
        x: ``[B, N, D]``.
        attention: ``[B, N]``.
        metric: ``[B, N, Dk]``, compared by cosine.
        keep: Of these `contextual_count` are targets.
        added: A target and the mean of the others, added, instead of the mean of all.
    """
    few = contextual_count(keep)
    dominant = ranks(attention) < keep - few
    here = torch.arange(x.shape[1], device=x.device)
    if not few:
        kept_indices = true_indices(dominant, keep)
        return Reduction(
            kept_indices, scores=attention, assignment=to_assignment(kept_indices, here.where(dominant, -1))
        )
    rest = true_indices(~dominant, x.shape[1] - keep + few)
    stride = rest.shape[1] // few
    targets = rest[:, : few * stride : stride]
    kept_indices = true_indices(dominant.scatter(1, targets, True), keep)
    assignment = nearest(metric, targets).masked_fill(dominant, -1)
    made, size = merge_mean(x, assignment, few)
    if added:
        made = merge_sum(x, assignment, targets)
    merged = x.scatter(1, targets[..., None].expand_as(made), made)
    sizes = torch.ones_like(attention).scatter(1, targets, size.to(attention))
    target = targets.gather(1, assignment.clamp_min(0)).where(~dominant, here)
    return Reduction(
        kept_indices,
        features=gather_tokens(merged, kept_indices),
        scores=attention,
        assignment=to_assignment(kept_indices, target),
        size=sizes.gather(1, kept_indices),
    )
