"""EViT: three times on the way through the vision tower, only the patches that CLS looks at go on."""

import math
from dataclasses import dataclass

import torch

from lit_reduce.ops.selectors import topk_sorted
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class EViTConfig(ReducerConfig):
    """What becomes of the others."""

    fuse: bool = option(False, "sum those that go, weighted by attention, into one more token")


@register
class EViT(Reducer):
    """Keeps the tokens with the most attention of CLS, between attention and MLP of three blocks.

    The blocks stand at a quarter, half and three quarters of the depth, as 3, 6 and 9 of 12 in the paper; each keeps
    the same share. With ``fuse`` one of the tokens is the sum of all that go, each times its attention (not
    renormalised, as in the official code); it stands where the most attended of them stood, and is a token like any
    other from then on. A tower without CLS ranks by the attention that a token receives (our reading).

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
        """A third of the way, by factors, at each of three blocks; fewer blocks where the tower has fewer."""
        blocks = sorted({depth * part // 4 for part in (1, 2, 3)})
        share = (keep / tokens) ** (1 / len(blocks))
        left = {block: math.ceil(tokens * share ** (i + 1) - 1e-9) for i, block in enumerate(blocks)}
        return left | {blocks[-1]: keep}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The most attended in raster order; with ``fuse`` the last place is the others'."""
        scores = tokens.signal("cls")
        kept_indices = topk_sorted(scores, keep)
        if not self.config.fuse:
            return Reduction(kept_indices, scores=scores)
        best = topk_sorted(scores, keep - 1) if keep > 1 else kept_indices[:, :0]
        going = torch.ones_like(scores, dtype=torch.bool).scatter(1, best, False)
        fused = (tokens.features * (scores * going).to(tokens.features.dtype)[..., None]).sum(1, keepdim=True)
        here = going.gather(1, kept_indices)  # exactly one of those that go is among the anchors
        features = torch.where(here[..., None], fused, Reduction(kept_indices).gather(tokens))
        places = torch.arange(keep, device=kept_indices.device).expand_as(kept_indices)
        owner = torch.where(going, here.int().argmax(1, keepdim=True), -1).scatter(1, kept_indices, places)
        return Reduction(kept_indices, features=features, scores=scores, assignment=owner)
