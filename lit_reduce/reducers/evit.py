"""EViT: drop the patches with the least CLS attention at three blocks of the vision tower."""

import math
from dataclasses import dataclass

import torch

from lit_reduce.ops.selectors import topk_sorted
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class EViTConfig(ReducerConfig):
    """Treatment of dropped tokens."""

    fuse: bool = option(False, "sum those that go, weighted by attention, into one more token")


@register
class EViT(Reducer):
    """Keeps the tokens with the most CLS attention, between attention and MLP of three blocks.

    The blocks are at a quarter, half and three quarters of the depth, as 3, 6 and 9 of 12 in the paper; each keeps the
    same ratio. With ``fuse`` one kept token is the sum of all dropped ones weighted by their attention (not
    renormalised, as in the official code); it takes the position of the most attended of them and is an ordinary token
    in later blocks. A tower without CLS token uses the attention that each token receives (our reading).

    Source: EViT, arXiv 2202.07800, section 3.
    """

    name = "evit"
    kind = "select"
    site = "encoder"
    point = "attention"
    signals = frozenset({"cls"})
    paper = "EViT, arXiv 2202.07800"
    config_class = EViTConfig

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """The same ratio at each of three blocks; fewer blocks if the tower has fewer."""
        blocks = sorted({depth * part // 4 for part in (1, 2, 3)})
        share = (keep / tokens) ** (1 / len(blocks))
        left = {block: math.ceil(tokens * share ** (i + 1) - 1e-9) for i, block in enumerate(blocks)}
        return left | {blocks[-1]: keep}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The most attended tokens in raster order; with ``fuse`` one of them is the fused token."""
        scores = tokens.signal("cls")
        kept_indices = topk_sorted(scores, keep)
        if not self.config.fuse:
            return Reduction(kept_indices, scores=scores)
        best = topk_sorted(scores, keep - 1) if keep > 1 else kept_indices[:, :0]
        going = torch.ones_like(scores, dtype=torch.bool).scatter(1, best, False)
        fused = (tokens.features * (scores * going).to(tokens.features.dtype)[..., None]).sum(1, keepdim=True)
        here = going.gather(1, kept_indices)  # exactly one dropped token is among the kept indices
        features = torch.where(here[..., None], fused, Reduction(kept_indices).gather(tokens))
        places = torch.arange(keep, device=kept_indices.device).expand_as(kept_indices)
        assignment = torch.where(going, here.int().argmax(1, keepdim=True), -1).scatter(1, kept_indices, places)
        return Reduction(kept_indices, features=features, scores=scores, assignment=assignment)
