"""Vision Remember: inside the language model, each token of a shortened picture reads its own region again."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.recall import within
from lit_reduce.ops.similarity import normal
from lit_reduce.recall import RecallReducer, TokenRecall
from lit_reduce.reducer import ReducerConfig, find, register
from lit_reduce.reducers.packer import level
from lit_reduce.tokens import Reduction, VisualTokens

GAIN = 20.0  # of the gates: an optimiser's steps suit weights, and a gate has further to go


@dataclass
class RememberConfig(ReducerConfig):
    """What shortens the picture, which layers read again, and what."""

    hidden_size: int = field(default=0, metadata={"help": "width of the backbone's visual tokens; set when training"})
    vision_hidden_size: int = field(default=0, metadata={"help": "width of the vision tower; set when training"})
    depth: int = field(default=0, metadata={"help": "layers of the language model; set when training"})
    short: str = field(default="packer", metadata={"help": "the reducer that makes the short stream: packer, pool"})
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "settings of that reducer"})
    layers: list[float] = field(
        default_factory=lambda: [0.2, 0.5, 0.8],
        metadata={"help": "before which decoder layers: numbers, or parts of the depth below 1"},
    )
    levels: list[float] = field(
        default_factory=lambda: [0.5, 0.75, -1],
        metadata={"help": "layers of the vision tower that are read: 3, -2, or 0.5 for a share of the depth"},
    )
    width: int = field(default=64, metadata={"help": "width of the attention from tokens to regions"})
    heads: int = field(default=4, metadata={"help": "attention heads"})


@register
class Remember(RecallReducer):
    """The short stream of another reducer, whose tokens each attend to features of their region before some layers.

    ``h += tanh(g) W_o MHA(LN(h), W_k B + s(B), W_v B)`` with B several layers of the vision tower, side by side, at the
    tokens that went into h's; ``s``, one number a token and head, is added to its logits; the gate g starts at zero, so
    that the untrained reducer is its short stream, to the bit.

    Source: Vision Remember, arXiv 2506.03928. Our reading: its text says that tokens attend to multi-level features
    within their window, but not how saliency enters; gate, norms (features and h have size 1 where they are read), the
    layers and the part that is shared (none) are ours.
    """

    name = "remember"
    reads = "tokens"
    trained = True
    paper = "Vision Remember, arXiv 2506.03928"
    config_class = RememberConfig
    smallest = RememberConfig(width=12, heads=3, levels=[0.5, -1], options={"width": 12, "heads": 3})

    def __init__(self, config: RememberConfig | None = None) -> None:
        super().__init__(config)
        c = self.config
        if min(c.width, c.heads) < 1 or c.width % c.heads:
            raise UserError(f"remember: width={c.width} must be a multiple of heads={c.heads}")
        for name, values in (("layers", c.layers), ("levels", c.levels)):
            if not isinstance(values, list) or not values or not all(type(x) in (int, float) for x in values):
                raise UserError(f"remember: {name}={values} must be a list of layers, such as [0.2, 0.5]")
        cls, options = find(c.short), dict(c.options)
        if cls.site != "projector" or cls.kind not in ("resample", "register"):
            raise UserError(f"remember: short={c.short} must make new tokens of regions at the projector: packer, pool")
        for key in {"hidden_size", "vision_hidden_size"} & set(cls.config_class.__dataclass_fields__):
            options.setdefault(key, getattr(c, key))
        self.short = cls(cls.config_class.from_options(options, owner=f"remember: {c.short}"))
        self.levels = [f"encoder@{level}" for level in c.levels]
        self.warmup_target = self.short.warmup_target if self.short.trained else ""
        self.signals = self.short.signals | frozenset(self.levels)
        seen = len(c.levels) * c.vision_hidden_size
        self.reads_again = nn.ModuleList(Read(c.hidden_size, seen, c.width, c.heads) for _ in c.layers)

    def recalls(self, depth: int) -> list[int]:
        """Those of the settings."""
        return sorted({int(x) if x >= 1 else int(x * depth) for x in self.config.layers})

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """The short stream, and the tower's features of every token."""
        short = self.short.reduce(tokens, keep)
        levels = [level(tokens, name, self) for name in self.levels]
        return replace(short, memory=torch.cat([normal(x) for x in levels], -1))

    def recall(self, look: TokenRecall) -> Tensor:
        """The hidden states with what they read added."""
        number = self.recalls(self.config.depth).index(look.layer)
        added: Tensor = self.reads_again[number](look.hidden, look.memory, look.owner)
        return look.hidden + added


class Read(nn.Module):
    """Gated attention of each token to its own region."""

    def __init__(self, size: int, seen: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.query = nn.LayerNorm(size, eps=1e-6), nn.Linear(size, width, bias=False)
        self.both, self.salience = nn.Linear(seen, 2 * width), nn.Linear(seen, heads, bias=False)
        self.leave = nn.Linear(width, size, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor, memory: Tensor, owner: Tensor) -> Tensor:
        """What is added ``[B, K, D]``, in units of each token's size.

        Args:
            hidden: ``[B, K, D]``.
            memory: ``[B, N, S]``.
            owner: ``[B, N]`` below K; -1 for none.
        """
        query = self.query(self.norm(hidden)).unflatten(-1, (self.heads, -1))
        keys, values = self.both(memory).unflatten(-1, (2, self.heads, -1)).unbind(2)
        index = owner.clamp_min(0)[..., None, None].expand_as(keys)
        logits = torch.einsum("bnhd,bnhd->bnh", query.gather(1, index), keys) * keys.shape[-1] ** -0.5
        read = within(logits + self.salience(memory), values, owner, hidden.shape[1])
        scale = hidden.square().mean(-1, keepdim=True).sqrt()
        out: Tensor = torch.tanh(GAIN * self.gate) * scale * self.leave(read.flatten(2))
        return out
