"""SparseVLM: words that look at the picture judge its tokens, and what is dropped leaves a few means behind."""

from dataclasses import dataclass

import torch

from lit_reduce.ops.budgets import geometric_schedule, recycled_split
from lit_reduce.ops.clusters import dpc_knn
from lit_reduce.ops.mergers import merge_mean, to_assignment
from lit_reduce.ops.scorers import rater_scores, text_raters
from lit_reduce.ops.selectors import ranks, true_indices
from lit_reduce.ops.similarity import gather_tokens
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class SparseVLMConfig(ReducerConfig):
    """Settings of `SparseVLM`."""

    layers: str = option("0.0625,0.1875,0.46875", "where, as shares of the depth (2, 6, 15)")


@register
class SparseVLM(Reducer):
    """Score: attention of the rater words, mean over heads and raters. Of the dropped 30 % are recycled into clusters.

    Raters are words that pay the picture more attention than the mean word (the paper: whose embedding does, in a
    softmax of products; a reducer inside the decoder sees no embeddings of the picture, so attention is our reading).
    The budget is what is left after the last stage, recycled tokens included; equal shares go at each stage, where the
    paper has tables: 309, 204 and 113 make its 192. Positions stay original, clusters stand at their peaks.
    """

    name = "sparsevlm"
    kind = "resample"
    site = "decoder"
    signals = frozenset({"text_rows"})
    paper = "SparseVLM, arXiv 2410.04417"
    config_class = SparseVLMConfig

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """Three stages."""
        return geometric_schedule([float(share) for share in self.config.layers.split(",")], depth, tokens, keep)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Kept tokens are copies; `dpc_knn` on the recycled ones."""
        x, rows = tokens.features, tokens.signal("text_rows").float()
        score = rater_scores(rows, text_raters(rows, tokens.signal("text_mask")))
        kept, recycled, clusters = recycled_split(tokens.count, keep)
        order = ranks(score)
        here = torch.arange(tokens.count, device=x.device).expand(len(x), -1)
        again = true_indices((order >= kept) & (order < kept + recycled), recycled)
        peaks, assignment = dpc_knn(gather_tokens(x, again), clusters)
        heads = again.gather(1, peaks)
        target = here.masked_fill(order >= kept, -1).scatter(1, again, heads.gather(1, assignment))
        kept_indices = true_indices((order < kept).scatter(1, heads, True), keep)
        taken = to_assignment(kept_indices, target)
        made, _ = merge_mean(x, taken, keep)
        return Reduction(kept_indices, features=made, scores=score, assignment=taken)
