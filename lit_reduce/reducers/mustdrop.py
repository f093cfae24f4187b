"""MustDrop: even windows of the picture merge early, and words of the prompt drop tokens later."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_reduce.ops.budgets import geometric_schedule
from lit_reduce.ops.mergers import mean_pairwise_cosine, merge_mean, to_assignment, windows
from lit_reduce.ops.selectors import ranks, true_indices
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class MustDropConfig(ReducerConfig):
    """Settings of `MustDrop`."""

    window: int = option(3, "tokens on a side of a window", min=1)


@register
class MustDrop(Reducer):
    """First stage: after the tower's first block, windows of like tokens become one, at their last token's place.

    The paper merges each window whose mean pairwise cosine is at least 0.8, as many as the picture has. With a budget
    the most alike windows merge until K tokens are left (64 of 576 are all of them); what is then still too much goes
    by CLS attention, a window by its sum: our reading. The decoder's stage is `mustdrop_prefill`.
    """

    name = "mustdrop"
    kind = "resample"
    site = "encoder"
    point = "before"
    signals = frozenset({"cls"})
    paper = "MustDrop, arXiv 2411.10803"
    config_class = MustDropConfig

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:  # noqa: ARG002
        """Once, before the second block."""
        return {1: keep}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Merge, then drop."""
        x, attention, count = tokens.features, tokens.signal("cls").float(), tokens.count
        here = torch.arange(count, device=x.device).expand(len(x), -1)
        frames, rows, columns = tokens.grid
        assignment = windows(tokens.grid, self.config.window).to(x.device)
        if frames * rows * columns != count or assignment.amax() < 0:
            assignment = here[0].new_full((count,), -1)
        number = int(assignment.amax()) + 1
        area = self.config.window**2
        target = here
        if number:
            last = here.new_zeros(number).scatter_reduce(
                0, assignment.clamp_min(0), here[0] * (assignment >= 0), "amax"
            )
            merged = ranks(mean_pairwise_cosine(x, assignment, number)) < min(number, (count - keep) // (area - 1))
            inside = (assignment >= 0) & merged[:, assignment.clamp_min(0)]
            target = torch.where(inside, last[assignment.clamp_min(0)], here)
        weight = torch.zeros_like(attention).scatter_add(1, target, attention)
        stays = ranks(weight.masked_fill(target != here, -torch.inf)) < keep
        kept_indices = true_indices(stays, keep)
        taken = to_assignment(kept_indices, target)
        return Reduction(kept_indices, features=merge_mean(x, taken, keep)[0], scores=attention, assignment=taken)


@dataclass
class MustDropPrefillConfig(ReducerConfig):
    """Settings of `MustDropPrefill`."""

    layers: str = option("0.0625,0.1875,0.46875", "where, as shares of the depth (2, 6, 15)")
    mean_threshold: float = option(0.001, "least share of all attention that the words pay")
    max_threshold: float = option(0.001, "least attention that one word pays")


@register
class MustDropPrefill(ScoringReducer):
    """Second stage: a token goes when the words' summed share and the largest of one word are both below thresholds.

    With a budget in the place of a picture's own count the tokens farthest above either threshold stay: our reading.
    The budget is that of the last stage; equal shares go at each before. Thresholds are the paper's for 192 tokens.
    """

    name = "mustdrop_prefill"
    site = "decoder"
    signals = frozenset({"text_rows"})
    paper = "MustDrop, arXiv 2411.10803"
    config_class = MustDropPrefillConfig

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """Three stages."""
        return geometric_schedule([float(share) for share in self.config.layers.split(",")], depth, tokens, keep)

    def score(self, tokens: VisualTokens) -> Tensor:
        """How many times its threshold the better of the two is ``[B, N]``."""
        rows = tokens.signal("text_rows").float().masked_fill(~tokens.signal("text_mask").bool()[..., None], 0)
        total = rows.sum(1)
        share = total / total.sum(-1, keepdim=True).clamp_min(1e-12)
        return torch.maximum(share / self.config.mean_threshold, rows.amax(1) / self.config.max_threshold)
