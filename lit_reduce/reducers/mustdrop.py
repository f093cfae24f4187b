"""MustDrop: merge uniform windows in the vision tower, and prune by the attention of the text in the decoder."""

import math
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
    """First stage: after the first tower block, windows of similar tokens become one, at the window's last position.

    The paper merges every window with a mean pairwise cosine of at least 0.8, as many as an image has. With a budget
    the most similar windows are merged until K tokens remain (64 of 576 are all of them); of what exceeds the budget
    the tokens with the least CLS attention are dropped, a window counting with its sum: our reading. The stage in the
    decoder is `mustdrop_prefill`.

    Source: MustDrop, arXiv 2411.10803.
    """

    name = "mustdrop"
    kind = "resample"
    site = "encoder"
    point = "before"
    signals = frozenset({"cls"})
    paper = "MustDrop, arXiv 2411.10803"
    config_class = MustDropConfig

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:  # noqa: ARG002
        """One stage, before the second block."""
        return {1: keep}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Merge windows, then drop tokens."""
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
    key_share: float = option(0.08, "share of the image that is never dropped, by CLS attention", min=0, max=1)


@register
class MustDropPrefill(ScoringReducer):
    """Second stage: drops tokens whose share of the text's attention and largest attention are below thresholds.

    As in the official code, a stage reads the attention of its layer and drops from its output, and the key set, the 8
    % of the image with the most CLS attention in the last tower layer, is never dropped. The official code keeps as
    many tokens as pass; with a budget those that exceed either threshold by the largest factor are kept, and of a key
    set larger than the budget the same (our reading). The budget is the count after the last stage, with a constant
    ratio per stage. Thresholds are the paper's for 192 tokens.

    Source: MustDrop, arXiv 2411.10803.
    """

    name = "mustdrop_prefill"
    site = "decoder"
    signals = frozenset({"text_rows", "cls@-1"})
    paper = "MustDrop, arXiv 2411.10803"
    config_class = MustDropPrefillConfig

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """Stages behind the layers of the settings."""
        shares = [float(share) for share in self.config.layers.split(",")]
        return geometric_schedule(shares, depth, tokens, keep, after=True)

    def score(self, tokens: VisualTokens) -> Tensor:
        """The larger factor by which a token exceeds its thresholds ``[B, N]``; the key set scores above all others."""
        rows = tokens.signal("text_rows").float().masked_fill(~tokens.signal("text_mask").bool()[..., None], 0)
        total = rows.sum(1)
        share = total / total.sum(-1, keepdim=True).clamp_min(1e-12)
        factor = torch.maximum(share / self.config.mean_threshold, rows.amax(1) / self.config.max_threshold)
        # No stage drops a key token, so those that remain are still the first of the whole image.
        whole = tokens.count if tokens.course is None else tokens.course.tokens
        key = ranks(tokens.signal("cls@-1").float()) < math.ceil(self.config.key_share * whole)
        return torch.where(key, factor + factor.amax(-1, keepdim=True) + 1, factor)
