"""CoViPAL: a small predictor scores image tokens from the image and the prompt."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.options import option
from lit_reduce.reducer import ReducerConfig, ScoringReducer, register
from lit_reduce.tokens import VisualTokens

PACE = 10.0  # factor on the summary parameters, which must reach the norm of tokens at the learning rate of weights


@dataclass
class CoViPALConfig(ReducerConfig):
    """Size of the predictor."""

    hidden_size: int = option(0, "width of the backbone's visual tokens; set when training", min=0)
    width: int = option(96, "width inside the predictor", min=1)
    layers: int = option(2, "blocks of image self-attention, image-to-prompt attention, MLP", min=0)
    heads: int = option(4, "attention heads of each block", min=1)
    summary: int = option(
        0,
        "tokens that stand for all that is dropped, within the budget; 0 for none, as in the paper",
        min=0,
        was="rest",
    )


@register
class CoViPAL(ScoringReducer):
    """Scores image tokens ``[B, N]`` from projected tokens and prompt embeddings, before the language model.

    One linear map embeds image and prompt, which share a space; type embeddings and a 2-D sine-cosine position
    embedding distinguish them. Each block applies self-attention over the image, then cross-attention to the prompt,
    then an MLP. Depth, width and position embedding are our reading: the text of the paper was not available.

    Our addition: ``summary`` tokens of the budget, at most a quarter of it, each the mean of the dropped tokens plus a
    learned vector. A frozen model relates what it sees to the whole image: without most of the background it counts one
    object too many, and distillation can give the summary the weight of the background.

    Source: CoViPAL, arXiv 2508.17243 (``S = p_theta(H_v, H_t)``, top-k of S).
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
        if width % self.config.heads:
            raise UserError(f"covipal: width={width} must be a multiple of heads={self.config.heads}")
        self.enter = nn.Linear(size, width, bias=False)
        self.normal = nn.RMSNorm(size, eps=1e-6)
        self.kinds = nn.Parameter(torch.zeros(2, width))
        self.blocks = nn.ModuleList(Block(width, self.config.heads) for _ in range(self.config.layers))
        if self.config.summary:
            self.kind = "resample"
            # Named as in the weights that are shipped.
            self.rest = nn.Parameter(0.02 / PACE * torch.randn(self.config.summary, size))
        # No bias: it would not change the ranking.
        self.leave = nn.Sequential(nn.RMSNorm(width, eps=1e-6), nn.Linear(width, 1, bias=False))

    def score(self, tokens: VisualTokens) -> Tensor:
        """Scores ``[B, N]``, higher is kept; padding of the prompt has no influence."""
        text, text_mask = tokens.signal("text"), tokens.signal("text_mask")
        image = self.enter(self.normal(tokens.features)) + self.kinds[0]
        image = image + position_embedding(tokens.count, tokens.grid, image)
        words = self.enter(self.normal(text)) + self.kinds[1]
        for block in self.blocks:
            image = block(image, words, text_mask)
        scores: Tensor = self.leave(image)[..., 0]
        return scores

    def summary_count(self, keep: int) -> int:
        """The option ``summary``, at most a quarter of the budget."""
        count: int = self.config.summary
        return min(count, keep // 4)

    def summary_tokens(self, tokens: VisualTokens, dropped: Tensor, count: int) -> Tensor:
        """Mean of the dropped tokens plus the learned vectors."""
        share = dropped.to(tokens.features) / dropped.sum(1, keepdim=True).clamp_min(1)
        return share[:, None] @ tokens.features + PACE * self.rest[:count]


class Block(nn.Module):
    """Pre-norm block: self-attention over the image, cross-attention to the prompt, gated MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.look, self.ask = Attention(width, heads), Attention(width, heads)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in range(4))
        self.gate = nn.Linear(width, 2 * 2 * width, bias=False)
        self.out = nn.Linear(2 * width, width, bias=False)

    def forward(self, image: Tensor, words: Tensor, text_mask: Tensor) -> Tensor:
        """Update the image tokens ``[B, N, W]``, given the prompt ``[B, T, W]``."""
        seen = self.norms[0](image)
        image = image + self.look(seen, seen, None)
        image = image + self.ask(self.norms[1](image), self.norms[3](words), text_mask)
        a, b = self.gate(self.norms[2](image)).chunk(2, -1)
        updated: Tensor = image + self.out(F.silu(a) * b)
        return updated


class Attention(nn.Module):
    """Multi-head attention from one sequence to another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.output = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.both = nn.Linear(width, 2 * width, bias=False)

    def forward(self, x: Tensor, to: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from ``x`` ``[B, N, W]`` to ``to`` ``[B, M, W]``; ``mask`` ``[B, M]`` is true at visible positions."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.both(to).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = None if mask is None else mask[:, None, None, :].expand(-1, -1, x.shape[1], -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result


def position_embedding(count: int, grid: tuple[int, int, int], like: Tensor) -> Tensor:
    """2-D sine-cosine position embedding ``[count, W]``; tokens beyond the grid are placed by raster order."""
    _, rows, cols = grid
    index = torch.arange(count, device=like.device)
    at = torch.stack([(index // cols) / max(rows, 1), (index % cols) / max(cols, 1)], -1)
    quarter = like.shape[-1] // 4
    rate = 2 * torch.pi * 16.0 ** (torch.arange(quarter, device=like.device) / max(1, quarter - 1)) / 2
    angle = (at[..., None] * rate).flatten(1)
    table = torch.cat([angle.sin(), angle.cos()], -1)
    return F.pad(table, (0, like.shape[-1] - table.shape[-1])).to(like.dtype)
