"""CoViPAL: a small contextual predictor reads image and prompt, and says which image tokens will matter."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import VisualTokens

PACE = 10.0  # vectors must grow as large as tokens are: so much faster than weights do at the same learning rate


@dataclass
class CoViPALConfig(ReducerConfig):
    """Size of the predictor."""

    hidden_size: int = field(default=0, metadata={"help": "width of the backbone's visual tokens; set when training"})
    width: int = field(default=96, metadata={"help": "width inside the predictor"})
    layers: int = field(default=2, metadata={"help": "blocks of image self-attention, image-to-prompt attention, MLP"})
    heads: int = field(default=4, metadata={"help": "attention heads of each block"})
    rest: int = field(
        default=0,
        metadata={"help": "tokens that stand for all that is dropped, within the budget; 0 for none, as in the paper"},
    )


@register
class CoViPAL(ScoringReducer):
    """Scores image tokens ``[B, N]`` from the projected tokens and the prompt, before the language model.

    One input map serves image and prompt, which live in the same space; type embeddings and a 2-D sine-cosine place
    tell them apart. Each block lets image tokens look at one another, then at the prompt. Depth, width and the places
    are our reading: the paper's text was not available.

    A frozen model weighs what it sees against all the rest: where nearly all of the background is gone it counts one
    object too many. So ``rest`` tokens of the budget, a quarter of it at most, are the mean of what is dropped and a
    learned vector each, which distillation gives the weight that the rest had. They are our addition.

    Source: CoViPAL, arXiv 2508.17243 (S = p_theta(H_v, H_t), top-K of S).
    """

    name = "covipal"
    kind = "select"
    site = "projector"
    signals = frozenset({"text"})
    trained = True
    paper = "CoViPAL, arXiv 2508.17243"
    config_class = CoViPALConfig
    smallest = CoViPALConfig(width=12, layers=1, heads=3)

    def __init__(self, config: CoViPALConfig | None = None) -> None:
        super().__init__(config)
        size, width = self.config.hidden_size, self.config.width
        if min(width, self.config.heads) < 1 or width % self.config.heads:
            raise UserError(f"covipal: width={width} must be a multiple of heads={self.config.heads}")
        self.enter = nn.Linear(size, width, bias=False)
        self.normal = nn.RMSNorm(size, eps=1e-6)
        self.kinds = nn.Parameter(torch.zeros(2, width))
        self.blocks = nn.ModuleList(Block(width, self.config.heads) for _ in range(self.config.layers))
        if self.config.rest < 0:
            raise UserError(f"covipal: rest={self.config.rest}: give 0 or more")
        if self.config.rest:
            self.kind = "resample"
            self.rest = nn.Parameter(0.02 / PACE * torch.randn(self.config.rest, size))
        # No bias: it would raise all scores alike, which no ranking notices.
        self.leave = nn.Sequential(nn.RMSNorm(width, eps=1e-6), nn.Linear(width, 1, bias=False))

    def score(self, tokens: VisualTokens) -> Tensor:
        """Scores ``[B, N]``, higher is kept; padding of the prompt has no influence."""
        text, text_mask = tokens.signal("text"), tokens.signal("text_mask")
        image = self.enter(self.normal(tokens.features)) + self.kinds[0]
        image = image + places(tokens.count, tokens.grid, image)
        words = self.enter(self.normal(text)) + self.kinds[1]
        for block in self.blocks:
            image = block(image, words, text_mask)
        scores: Tensor = self.leave(image)[..., 0]
        return scores

    def summary_count(self, keep: int) -> int:
        """A quarter of the budget at most."""
        rest: int = self.config.rest
        return min(rest, keep // 4)

    def summary_tokens(self, tokens: VisualTokens, dropped: Tensor, count: int) -> Tensor:
        """The mean of what is dropped, and what was learned, in tenths."""
        share = dropped.to(tokens.features) / dropped.sum(1, keepdim=True).clamp_min(1)
        return share[:, None] @ tokens.features + PACE * self.rest[:count]


class Block(nn.Module):
    """Image self-attention, attention from image to prompt, gated MLP; each behind a norm and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.look, self.ask = Attention(width, heads), Attention(width, heads)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(4))
        self.gate = nn.Linear(width, 2 * 2 * width, bias=False)
        self.out = nn.Linear(2 * width, width, bias=False)

    def forward(self, image: Tensor, words: Tensor, text_mask: Tensor) -> Tensor:
        """Updates the image tokens ``[B, N, W]`` from each other and from the prompt ``[B, T, W]``."""
        seen = self.norms[0](image)
        image = image + self.look(seen, seen, None)
        image = image + self.ask(self.norms[1](image), self.norms[3](words), text_mask)
        a, b = self.gate(self.norms[2](image)).chunk(2, -1)
        updated: Tensor = image + self.out(F.silu(a) * b)
        return updated


class Attention(nn.Module):
    """Multi-head attention from one set of tokens to another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.output = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.both = nn.Linear(width, 2 * width, bias=False)

    def forward(self, x: Tensor, to: Tensor, mask: Tensor | None) -> Tensor:
        """Attends from ``x`` ``[B, N, W]`` to ``to`` ``[B, M, W]``; ``mask`` ``[B, M]`` is true where to look."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.both(to).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = None if mask is None else mask[:, None, None, :].expand(-1, -1, x.shape[1], -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result


def places(count: int, grid: tuple[int, int, int], like: Tensor) -> Tensor:
    """Sines and cosines of each token's row and column ``[count, W]``; tokens beyond the grid go by raster order."""
    _, rows, cols = grid
    index = torch.arange(count, device=like.device)
    at = torch.stack([(index // cols) / max(rows, 1), (index % cols) / max(cols, 1)], -1)
    quarter = like.shape[-1] // 4
    rate = 2 * torch.pi * 16.0 ** (torch.arange(quarter, device=like.device) / max(1, quarter - 1)) / 2
    angle = (at[..., None] * rate).flatten(1)
    table = torch.cat([angle.sin(), angle.cos()], -1)
    return F.pad(table, (0, like.shape[-1] - table.shape[-1])).to(like.dtype)
