"""RESTORE: what is not selected is merged at distinctive places, and its weight in attention comes back."""

from dataclasses import dataclass

import torch

from lit_reduce.ops.clusters import distinctive
from lit_reduce.ops.mergers import assignment, merge_mean
from lit_reduce.ops.selectors import places
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
    """Half the tokens are the selection beneath; the others are means of all that it left, around distinctive anchors.

    Tokens keep their original positions, and `Reduction.size` says how many each stands for: the log of it, added to
    attention, is the paper's calibration. New tokens of the reducer beneath are not used, its choice is.
    """

    name = "restore"
    kind = "resample"
    paper = "RESTORE, arXiv 2606.01711"
    config_class = RestoreConfig

    def __init__(self, config: RestoreConfig | None = None) -> None:
        super().__init__(config)
        self.kind = "resample"

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Exactly K; where the reducer beneath selects fewer than asked, more is merged."""
        x, count = tokens.features, tokens.count
        wanted = int(keep * self.config.gamma)
        kept = torch.zeros_like(x[..., 0], dtype=torch.bool)
        below = super().reduce(tokens, wanted) if wanted else None
        if below is not None:
            valid = torch.ones_like(below.kept_indices) if below.valid is None else below.valid.long()
            kept = torch.zeros_like(kept, dtype=torch.long).scatter_add(1, below.kept_indices, valid) > 0
        peaks, owner = distinctive(x, ~kept, keep - kept.sum(-1))
        here = torch.arange(count, device=x.device)
        kept_indices = places(kept | peaks, keep)
        taken = assignment(kept_indices, torch.where(kept, here, owner))
        made, size = merge_mean(x, taken, keep)
        made = torch.where(kept.gather(1, kept_indices)[..., None], gather_tokens(x, kept_indices), made)
        return Reduction(
            kept_indices,
            features=made,
            scores=None if below is None else below.scores,
            assignment=taken,
            size=size,
        )
