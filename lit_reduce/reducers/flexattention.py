"""FlexAttention: a pooled picture enters the language model; who speaks next may look closer at what it looks at."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.mergers import nearest
from lit_reduce.ops.recall import joined, read
from lit_reduce.ops.regression import Map
from lit_reduce.ops.similarity import gather_tokens, normal
from lit_reduce.recall import AttentionRecall, RecallReducer, layers_from
from lit_reduce.reducer import ReducerConfig, create, find, register
from lit_reduce.tokens import Reduction, VisualTokens

GAIN = 20.0  # of the gates: an optimiser's steps suit weights, and a gate has further to go


@dataclass
class FlexAttentionConfig(ReducerConfig):
    """What enters, who looks back, and at how much."""

    hidden_size: int = field(default=0, metadata={"help": "width of the backbone's visual tokens; set when training"})
    depth: int = field(default=0, metadata={"help": "layers of the language model; set when training"})
    key_size: int = field(
        default=0, metadata={"help": "width of a layer's keys over all groups of heads; 0: that of its tokens"}
    )
    short: str = field(default="pool", metadata={"help": "the training-free reducer that makes the short stream"})
    first: float = field(
        default=0.28, metadata={"help": "the first layer that looks back: a number (9), or a part of the depth below 1"}
    )
    rank: int = field(default=32, metadata={"help": "width of the trunk that all keys and values go through"})
    threshold: float = field(
        default=48 / 255,
        metadata={"help": "look at what gets more attention than this, from the least (0) to most (1)"},
    )
    share: float = field(default=0.0, metadata={"help": "above 0: look at exactly this share of the picture instead"})


@register
class FlexAttention(RecallReducer):
    """``keep`` tokens stand in the sequence; from a layer on, asking tokens attend to full tokens beside them too.

    Asking are the prompt's last token and each token of the answer. Their attention in the layer before, to the short
    stream, mean over heads, says which full tokens they see: those of every cell above a threshold between the least
    and the most attended (paper: 48/255; a cell of the short stream is what the paper's dilation to blocks makes, our
    reading), or a fixed share. No gradient passes through this choice. Keys and values are maps of the full tokens
    behind the projector, turned to the tokens' original positions; one softmax runs over both kinds of keys.

    Source: FlexAttention, arXiv 2407.20228, where the bank has nine times the pixels and the whole model is trained.
    Our reading, for a frozen model: the bank is what the model would have read without a reducer; the maps are of low
    rank, with one trunk for all layers, and start as the closed-form regression on the model's own keys and values; a
    gate in each layer, ``tanh``, starts at zero, so that the untrained reducer is its short stream, to the bit.
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
        if c.first <= 0 or (c.first >= 1 and c.first != int(c.first)):
            raise UserError(f"flexattention: first={c.first}: give a layer from 1 on, or a part of the depth below 1")
        if c.rank < 1 or not 0 <= c.share <= 1:
            raise UserError(f"flexattention: rank={c.rank}, share={c.share}: a rank from 1 on, a share from 0 to 1")
        if find(c.short).trained or find(c.short).site != "projector":
            raise UserError(f"flexattention: short={c.short} must be training-free and act at the projector")
        self.short = create(c.short)
        self.signals = self.short.signals
        count, wide = len(self.recalls(c.depth)), c.key_size or c.hidden_size
        self.trunk = nn.Linear(c.hidden_size, c.rank, bias=False)
        self.heads = nn.ModuleList(nn.Linear(c.rank, 2 * wide) for _ in range(count))
        self.gates = nn.Parameter(torch.zeros(count))

    def recalls(self, depth: int) -> range:
        """From the first one on."""
        return layers_from(self.config.first, depth)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The short stream, and what the trunk makes of every token."""
        short = self.short.reduce(tokens, keep)
        owner = short.assignment
        if owner is None:  # a choice: each other token goes with the chosen one that is most like it
            owner = nearest(tokens.features, short.kept_indices)
        return replace(short, memory=self.trunk(normal(tokens.features)), assignment=owner)

    def choose(self, row: Tensor, real: Tensor) -> Tensor:
        """Which tokens ``[B, R, N]`` each asking token sees; the attention ``row`` is that of their cells."""
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
        """Joint attention to the layer's own keys and the chosen ones."""
        number = look.layer - self.recalls(self.config.depth).start
        chosen = self.choose(look.row, look.real)
        # Only what some asking token sees is projected at all.
        union = chosen.any(1)
        many = int(union.sum(1).max())
        if not many:
            return look.answer
        index = union.int().argsort(dim=1, descending=True, stable=True)[:, :many]
        keys, values = self.heads[number](gather_tokens(look.memory, index)).chunk(2, -1)
        keys = look.turn(keys, index)
        values = values.unflatten(-1, (keys.shape[1], -1)).transpose(1, 2)
        seen = chosen.gather(2, index[:, None].expand(-1, chosen.shape[1], -1))
        more, mass = read(look.queries, keys, values, seen, look.scaling)
        return joined(look.answer, look.mass, more, mass, torch.tanh(GAIN * self.gates[number]))

    @torch.no_grad()
    def learn(self, maps: Map) -> None:
        """Start from a regression of keys and values, layer after layer, on `normal` tokens."""
        self.trunk.weight.zero_()[: maps.down.shape[1]] = maps.down.T
        width = self.heads[0].out_features
        for head, up, bias in zip(self.heads, maps.up.split(width, 1), maps.bias.split(width), strict=True):
            layer: Any = head
            layer.weight.zero_()[:, : len(up)] = up.T
            layer.bias.copy_(bias)
