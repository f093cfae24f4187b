"""SparseVLM: attention of selected text tokens ranks visual tokens, and dropped tokens are merged into clusters."""

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
    """Scores a token by the attention of rater tokens, mean over heads; 30 % of the dropped tokens become clusters.

    As in the official code, a stage reads the attention of its layer (2, 6, 15 of 32) and drops from its output. Raters
    are text tokens behind the image that attend to it more than the average one. The official code selects them once,
    by a softmax of products of embeddings, which are not available between decoder layers (our reading). The budget is
    the count after the last stage, clusters included, with a constant ratio per stage; the official code has tables:
    309, 204 and 113 for 192. Positions stay original and a cluster has that of its centre, where the official code
    appends clusters and renumbers.

    Source: SparseVLM, arXiv 2410.04417.
    """

    name = "sparsevlm"
    kind = "resample"
    site = "decoder"
    signals = frozenset({"text_rows"})
    paper = "SparseVLM, arXiv 2410.04417"
    config_class = SparseVLMConfig

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """Stages behind the layers of the settings."""
        shares = [float(share) for share in self.config.layers.split(",")]
        return geometric_schedule(shares, depth, tokens, keep, after=True)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Kept tokens are copies; recycled ones are clustered by `dpc_knn`."""
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
