"""VisionZip: dominant tokens by CLS attention, and contextual tokens that merge the others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_reduce.errors import UserError
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
    """Keeps the tokens with the most CLS attention; contextual tokens at an even stride of the others merge the rest.

    Of 192, 128 and 64 tokens 30, 20 and 10 are contextual. A token is assigned to the contextual one with the most
    similar keys, all heads concatenated; with ``heads``, keys are averaged over them first. A contextual token is the
    mean of its members. With ``parity="official"`` it is their target plus the mean of the others, as in the official
    code, and ``heads`` is required, since that code averages keys over heads. What differs in either case: the paper
    merges before the projector, we merge projected tokens; its first dominant token is CLS, which the projector does
    not get, so that one more patch is dominant here; and it puts contextual tokens last, where ours take the position
    of their target.

    Source: VisionZip, arXiv 2412.04467.
    """

    name = "visionzip"
    kind = "resample"
    signals = frozenset({"cls", "keys"})
    paper = "VisionZip, arXiv 2412.04467"
    config_class = VisionZipConfig

    def __init__(self, config: VisionZipConfig | None = None) -> None:
        super().__init__(config)
        if self.config.parity == "official" and self.config.heads < 2:
            raise UserError(
                "visionzip: parity=official averages keys over the tower's heads: give heads (CLIP-L has 16)"
            )

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Tokens in raster order, a contextual one at the position of its target."""
        keys = to_float32(tokens.signal("keys")).unflatten(-1, (self.config.heads, -1)).mean(2)
        return dominant_and_contextual(
            tokens.features, tokens.signal("cls").float(), keys, keep, added=self.config.parity == "official"
        )


def dominant_and_contextual(x: Tensor, attention: Tensor, metric: Tensor, keep: int, added: bool = False) -> Reduction:
    """Select dominant tokens by attention and merge the others into evenly spaced ones of them.

    Args:
        x: ``[B, N, D]``.
        attention: ``[B, N]``.
        metric: ``[B, N, Dk]``, compared by cosine.
        keep: Number of tokens, `contextual_count` of which are contextual.
        added: Add the mean of the merged tokens to the contextual one, instead of taking the mean of all.
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
