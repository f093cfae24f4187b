"""RESTORE: merge the tokens that another reducer does not select, and record the sizes of merged tokens."""

from dataclasses import dataclass

import torch

from lit_reduce.ops.clusters import distinctive_tokens
from lit_reduce.ops.mergers import merge_mean, to_assignment
from lit_reduce.ops.selectors import true_indices
from lit_reduce.ops.similarity import gather_tokens
from lit_reduce.options import option
from lit_reduce.reducer import register
from lit_reduce.reducers.on_top import OnTop, OnTopConfig
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class RestoreConfig(OnTopConfig):
    """Settings of `Restore`."""

    gamma: float = option(0.5, "share of the budget that the reducer beneath selects", min=0, max=1)


@register
class Restore(OnTop):
    """A share of the tokens is selected by the inner reducer; the others are means of the remaining tokens.

    The means are taken around distinctive tokens, see `distinctive_tokens`. Tokens keep their original positions.
    `Reduction.size` holds the number of tokens that each one represents; its logarithm, added to the attention logits,
    is the calibration of the paper. Of the inner reducer only the selection is used, not its features.
    """

    name = "restore"
    kind = "resample"
    paper = "RESTORE, arXiv 2606.01711"
    config_class = RestoreConfig

    def __init__(self, config: RestoreConfig | None = None) -> None:
        super().__init__(config)
        self.kind = "resample"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Exactly K tokens; if the inner reducer selects fewer than requested, more are merged."""
        x, count = tokens.features, tokens.count
        wanted = int(keep * self.config.gamma)
        kept = torch.zeros_like(x[..., 0], dtype=torch.bool)
        below = super().reduce(tokens, wanted) if wanted else None
        if below is not None:
            valid = torch.ones_like(below.kept_indices) if below.valid is None else below.valid.long()
            kept = torch.zeros_like(kept, dtype=torch.long).scatter_add(1, below.kept_indices, valid) > 0
        peaks, assignment = distinctive_tokens(x, ~kept, keep - kept.sum(-1))
        here = torch.arange(count, device=x.device)
        kept_indices = true_indices(kept | peaks, keep)
        taken = to_assignment(kept_indices, torch.where(kept, here, assignment))
        made, size = merge_mean(x, taken, keep)
        made = torch.where(kept.gather(1, kept_indices)[..., None], gather_tokens(x, kept_indices), made)
        return Reduction(
            kept_indices,
            features=made,
            scores=None if below is None else below.scores,
            assignment=taken,
            size=size,
        )
