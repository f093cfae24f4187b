"""EfficientVLA's token selector: task-relevant tokens, and diverse ones beside them."""

from dataclasses import dataclass

import torch

from lit_reduce.ops.selectors import ranks, true_indices
from lit_reduce.ops.similarity import cosine, gather_tokens
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Reduction, VisualTokens


@dataclass
class EfficientVLAConfig(ReducerConfig):
    """Settings of `EfficientVLA`."""

    layer: float = option(0.0625, "where, as share of the depth (2 of 32)")
    key: int = option(4, "key tokens, the most attended", min=0)
    alpha: float = option(0.5, "share of the others that goes by attention too", min=0, max=1)


@register
class EfficientVLA(Reducer):
    """Selects ``key + floor(alpha (K - key))`` tokens by attention of the text and the others by diversity.

    Diversity is one minus the largest cosine to a key token. Layer skipping and action caching of the paper are not
    included.
    """

    name = "efficientvla"
    site = "decoder"
    signals = frozenset({"text_rows"})
    paper = "EfficientVLA, arXiv 2506.10100"
    config_class = EfficientVLAConfig

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:  # noqa: ARG002
        """One stage."""
        return {min(depth - 1, max(1, round(self.config.layer * depth))): keep}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Attention is summed over text tokens."""
        rows = tokens.signal("text_rows").float()
        scores = rows.masked_fill(~tokens.signal("text_mask").bool()[..., None], 0).sum(1)
        key = max(1, min(self.config.key, keep))
        order = ranks(scores)
        task = key + int(self.config.alpha * (keep - key))
        keys = gather_tokens(tokens.features, order.argsort(-1)[:, :key])
        closest = cosine(keys, tokens.features).amax(1)
        chosen = order < task
        chosen = chosen | (ranks((-closest).masked_fill(chosen, -torch.inf)) < keep - task)
        return Reduction(true_indices(chosen, keep), scores=scores)
