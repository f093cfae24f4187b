"""FlexAttention: a pooled image enters the language model, and attention to selected full tokens is added later."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.attention import attend, join_softmax
from lit_reduce.ops.mergers import nearest
from lit_reduce.ops.regression import Map
from lit_reduce.ops.similarity import gather_tokens, rms_normalize
from lit_reduce.options import option
from lit_reduce.recall import AttentionRecall, RecallReducer, layers_from
from lit_reduce.reducer import ReducerConfig, create, find, register
from lit_reduce.tokens import Reduction, VisualTokens

GAIN = 20.0  # factor on the gate parameters, which must move further than weights at the same learning rate


@dataclass
class FlexAttentionConfig(ReducerConfig):
    """Reducer of the sequence, layers that recall, and selection of the recalled tokens."""

    hidden_size: int = option(0, "width of the backbone's visual tokens; set when training", min=0)
    depth: int = option(0, "layers of the language model; set when training", min=0)
    key_size: int = option(0, "width of a layer's keys over all groups of heads; 0: that of its tokens", min=0)
    short: str = option("pool", "the training-free reducer that makes the short stream")
    first: float = option(
        0.28, "the first layer that looks back: a number (9), or a part of the depth below 1", above=0
    )
    rank: int = option(32, "width of the trunk that all keys and values go through", min=1)
    threshold: float = option(0.188, "look at what gets more attention than this, from the least (0) to most (1)")
    share: float = option(0.0, "above 0: look at exactly this share of the picture instead", min=0, max=1)


@register
class FlexAttention(RecallReducer):
    """``keep`` tokens are in the sequence; from a layer on, some queries also attend to selected full tokens.

    The queries are the prompt's last token and each generated token. Their attention to the ``keep`` tokens in the
    previous layer, mean over heads, selects the full tokens they attend to: those of every cell above a threshold
    between the least and the most attended (48/255 in the paper; a cell takes the place of the paper's dilation to
    blocks, our reading), or a fixed share. The selection passes no gradient. Keys and values are maps of the projected
    full tokens, rotated to the original positions; one softmax covers both sets of keys.

    Source: FlexAttention, arXiv 2407.20228, where the full tokens are of an image with nine times the pixels and the
    whole model is trained. Our readings, for a frozen model: the full tokens are those that the model would get without
    a reducer; the maps are of low rank, share a trunk over all layers, and are initialised by closed-form regression on
    the model's own keys and values; a gate in each layer, ``tanh``, is initialised to zero, so that the untrained
    reducer equals the reducer in ``short`` to the bit.
    """

    name = "flexattention"
    reads = "attention"
    trained = True
    warmup_target = "keys"
    paper = "FlexAttention, arXiv 2407.20228"
    config_class = FlexAttentionConfig
    smallest = FlexAttentionConfig(rank=3)

    def __init__(self, config: FlexAttentionConfig | None = None) -> None:
        super().__init__(config)
        c = self.config
        if c.first >= 1 and c.first != int(c.first):
            raise UserError(f"flexattention: first={c.first}: give a layer from 1 on, or a part of the depth below 1")
        if find(c.short).trained or find(c.short).site != "projector":
            raise UserError(f"flexattention: short={c.short} must be training-free and act at the projector")
        self.short = create(c.short)
        self.signals = self.short.signals
        count, wide = len(self.recalls(c.depth)), c.key_size or c.hidden_size
        self.trunk = nn.Linear(c.hidden_size, c.rank, bias=False)
        self.heads = nn.ModuleList(nn.Linear(c.rank, 2 * wide) for _ in range(count))
        self.gates = nn.Parameter(torch.zeros(count))

    def recalls(self, depth: int) -> range:
        """All layers from ``first`` on."""
        return layers_from(self.config.first, depth)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Reduction by the reducer ``short``, with the trunk's output for every token as memory."""
        short = self.short.reduce(tokens, keep)
        assignment = short.assignment
        if assignment is None:  # a selection: assign every token to the most similar selected one
            assignment = nearest(tokens.features, short.kept_indices)
        return replace(short, memory=self.trunk(rms_normalize(tokens.features)), assignment=assignment)

    def choose(self, row: Tensor, real: Tensor) -> Tensor:
        """Mask of the tokens that each query attends to ``[B, R, N]``, from the attention ``row`` to their cells."""
        seen = real[:, None]
        if self.config.share > 0:
            count: Tensor = (self.config.share * real.sum(1)).ceil().long()
            rank = row.masked_fill(~seen, -1).argsort(dim=2, descending=True, stable=True).argsort(dim=2)
            return (rank < count[:, None, None]) & seen
        least = row.masked_fill(~seen, torch.inf).amin(2, keepdim=True)
        most = row.masked_fill(~seen, -torch.inf).amax(2, keepdim=True)
        high: Tensor = (row - least) / (most - least).clamp_min(1e-30) > self.config.threshold
        return high & seen

    def recall(self, look: AttentionRecall) -> Tensor:
        """Joint attention over the layer's own keys and the selected ones."""
        number = look.layer - self.recalls(self.config.depth).start
        chosen = self.choose(look.row, look.real)
        # Project only tokens that some query attends to.
        union = chosen.any(1)
        many = int(union.sum(1).max())
        if not many:
            return look.answer
        index = union.int().argsort(dim=1, descending=True, stable=True)[:, :many]
        keys, values = self.heads[number](gather_tokens(look.memory, index)).chunk(2, -1)
        keys = look.turn(keys, index)
        values = values.unflatten(-1, (keys.shape[1], -1)).transpose(1, 2)
        seen = chosen.gather(2, index[:, None].expand(-1, chosen.shape[1], -1))
        more, mass = attend(look.queries, keys, values, seen, look.scaling)
        return join_softmax(look.answer, look.mass, more, mass, torch.tanh(GAIN * self.gates[number]))

    @torch.no_grad()
    def learn(self, maps: Map) -> None:
        """Initialise from a regression of keys and values of all layers on RMS-normalised tokens."""
        self.trunk.weight.zero_()[: maps.down.shape[1]] = maps.down.T
        width = self.heads[0].out_features
        for head, up, bias in zip(self.heads, maps.up.split(width, 1), maps.bias.split(width), strict=True):
            layer: Any = head
            layer.weight.zero_()[:, : len(up)] = up.T
            layer.bias.copy_(bias)
