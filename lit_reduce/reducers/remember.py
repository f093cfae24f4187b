"""Vision Remember: inside the language model, each token of a reduced image attends to its own region again."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.attention import grouped_attention
from lit_reduce.ops.similarity import rms_normalize
from lit_reduce.options import option
from lit_reduce.recall import RecallReducer, TokenRecall
from lit_reduce.reducer import ReducerConfig, find, register
from lit_reduce.reducers.packer import tower_features
from lit_reduce.tokens import Reduction, VisualTokens

GAIN = 20.0  # factor on the gate parameters, which must move further than weights at the same learning rate


@dataclass
class RememberConfig(ReducerConfig):
    """Inner reducer, layers that recall, and size of their attention."""

    hidden_size: int = option(0, "width of the backbone's visual tokens; set when training", min=0)
    vision_hidden_size: int = option(0, "width of the vision tower; set when training", min=0)
    depth: int = option(0, "layers of the language model; set when training", min=0)
    short: str = option("packer", "the reducer that makes the short stream: packer, pool")
    options: dict[str, Any] = option({}, "settings of that reducer")
    layers: list[float] = option(
        [0.2, 0.5, 0.8], "before which decoder layers: numbers, or parts of the depth below 1", min_items=1
    )
    levels: list[float] = option(
        [0.5, 0.75, -1], "layers of the vision tower that are read: 3, -2, or 0.5 for a share of the depth", min_items=1
    )
    width: int = option(64, "width of the attention from tokens to regions", min=1)
    heads: int = option(4, "attention heads", min=1)


@register
class Remember(RecallReducer):
    """Tokens of an inner reducer, each of which attends to tower features of its region before some layers.

    ``h += tanh(g) W_o MHA(LN(h), W_k B + s(B), W_v B)``, where B holds several layers of the vision tower,
    concatenated, at the tokens that were merged into h. ``s``, one number per token and head, is added to the logits.
    The gate g is initialised to zero, so that the untrained reducer equals its inner reducer, to the bit.

    Source: Vision Remember, arXiv 2506.03928. Our readings: the text says that tokens attend to multi-level features
    within their window, but not how saliency enters; gate, norms (features and h are normalised before they are read),
    the layers, and separate weights per layer are ours.
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
        if c.width % c.heads:
            raise UserError(f"remember: width={c.width} must be a multiple of heads={c.heads}")
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
        """The layers in the settings."""
        return sorted({int(x) if x >= 1 else int(x * depth) for x in self.config.layers})

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Reduction by the inner reducer, with the tower features of every token as memory."""
        short = self.short.reduce(tokens, keep)
        levels = [tower_features(tokens, name, self) for name in self.levels]
        return replace(short, memory=torch.cat([rms_normalize(x) for x in levels], -1))

    def recall(self, look: TokenRecall) -> Tensor:
        """Hidden states plus the output of the attention."""
        number = self.recalls(self.config.depth).index(look.layer)
        added: Tensor = self.reads_again[number](look.hidden, look.memory, look.assignment)
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

    def forward(self, hidden: Tensor, memory: Tensor, assignment: Tensor) -> Tensor:
        """Residual update ``[B, K, D]``, relative to the norm of each token.

        Args:
            hidden: ``[B, K, D]``.
            memory: ``[B, N, S]``.
            assignment: ``[B, N]`` below K; -1 for none.
        """
        query = self.query(self.norm(hidden)).unflatten(-1, (self.heads, -1))
        keys, values = self.both(memory).unflatten(-1, (2, self.heads, -1)).unbind(2)
        index = assignment.clamp_min(0)[..., None, None].expand_as(keys)
        logits = torch.einsum("bnhd,bnhd->bnh", query.gather(1, index), keys) * keys.shape[-1] ** -0.5
        read = grouped_attention(logits + self.salience(memory), values, assignment, hidden.shape[1])
        scale = hidden.square().mean(-1, keepdim=True).sqrt()
        out: Tensor = torch.tanh(GAIN * self.gate) * scale * self.leave(read.flatten(2))
        return out
