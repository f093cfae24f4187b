"""ToMe: merge similar tokens in every block of the vision tower."""

from dataclasses import dataclass

from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.ops.matching import bipartite
from lit_reduce.ops.mergers import merge_mean, to_assignment
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class ToMeConfig(ReducerConfig):
    """Similarity metric."""

    heads: int = option(
        0, "the tower's heads, to compare by the mean of their keys as the paper does; 0: side by side", min=0
    )


@register
class ToMe(Reducer):
    """Merges tokens between attention and MLP, in every block the same number as far as pairs allow.

    Similarity is the cosine of keys. A merged token is the mean over all patches that it represents, and attention
    weights it by their number (the runtime adds the log of its size). It takes the position of the token at the odd
    position. CLS is not merged. Our readings: keys of all heads concatenated (see the option), patches alternate from
    index 0.

    Source: ToMe, arXiv 2210.09461, section 3.
    """

    name = "tome"
    kind = "resample"
    site = "encoder"
    point = "attention"
    signals = frozenset({"keys", "size"})
    paper = "ToMe, arXiv 2210.09461"
    config_class = ToMeConfig

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """The same number of merges in each block; more in later blocks only if that would not reach ``keep``.

        Raises:
            UserError: Halving in every block is not enough.
        """
        if keep << depth < tokens:
            raise UserError(
                f"tome: keep={keep} of {tokens} tokens cannot be reached in {depth} blocks, each of which can halve; "
                f"give at least {-(-tokens >> depth)}"
            )
        left: dict[int, int] = {}
        for block in range(depth):
            after = depth - block - 1
            even = tokens - -(-(tokens - keep) // (after + 1))
            tokens = left[block] = min(even, keep << after)
        return left

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Merge the most similar pairs until ``keep`` tokens remain, at least half of those present."""
        metric, size = tokens.signal("keys"), tokens.signal("size")
        if self.config.heads:
            metric = metric.unflatten(-1, (self.config.heads, -1)).mean(-2)
        into = bipartite(metric, tokens.count - keep, self.penalty(tokens))
        kept_indices = _stay(into, keep)
        assignment = to_assignment(kept_indices, into)
        features, sizes = merge_mean(tokens.features, assignment, keep, size)
        return Reduction(kept_indices, features=features, assignment=assignment, size=sizes)

    def penalty(self, tokens: VisualTokens) -> Tensor | None:  # noqa: ARG002  (Turbo reads them)
        """Penalty on merging each token ``[B, N]``, or None."""
        return None


def _stay(into: Tensor, keep: int) -> Tensor:
    """Indices of the tokens that are merged into themselves ``[B, keep]``, ascending."""
    own = into == into.new_tensor(range(into.shape[1]))
    return own.nonzero()[:, 1].view(len(into), keep)
