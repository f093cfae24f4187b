"""ATP-LLaVA: adaptive pruning between decoder layers, with a token count per image and instruction."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.budgets import geometric_schedule_for_mean
from lit_reduce.ops.gates import anneal
from lit_reduce.ops.similarity import rms_normalize
from lit_reduce.ops.thresholds import (
    NONE,
    effective_share,
    feasible_count,
    grid_scores,
    mass_threshold,
    max_normalize,
    ragged_topk,
)
from lit_reduce.options import option
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Course, Reduction, VisualTokens

EDGE = 1e-3
SHUT = 1e-3  # tokens with a smaller mask are left out in training


@dataclass
class ATPConfig(ReducerConfig):
    """Stages, size and loss weights of `ATP`."""

    hidden_size: int = option(0, "width of the backbone's visual tokens; set when training", min=0)
    sites: list[float] = option(
        [0.125, 0.4375, 0.75],
        "where, as parts of the depth (4, 14, 24 of 32); 0: before layer 0",
        min=0,
        below=1,
        min_items=1,
    )
    width: int = option(64, "width inside each head", min=1)
    cross: str = option("text", "whose attention is the cross-modal score", choices=("text", "last"))
    residual: bool = option(True, "whether a learned map of the tokens weighs their scores")
    adaptive: bool = option(True, "whether thresholds decide, and keep is met on average only")
    lean: float = option(1.0, "how much more stays at the first site where words look at more; 0: no more", min=0)
    target: float = option(2.0, "weight of the gap between mean count and budget", min=0)
    deep: float = option(0.0, "weight of the tokens left at each site, the later the more", min=0)
    softness: list[float] = option([0.3, 0.02], "of the mask when training begins and ends", above=0, min_items=2)


@register
class ATP(Reducer):
    """Keeps a token if its importance or its spatial score exceeds a threshold; learned heads set both thresholds.

    The importance ``S`` is the mean of two attention scores, each divided by its maximum: the attention that a token
    receives from tokens of the image, and from the prompt. The spatial score is `grid_scores`. A head and the effective
    share of tokens that the prompt attends to (`effective_share`) give two thresholds, eq. 6 to 8. In training, later
    layers attend to a token by the soft mask ``M = max(M_r, M_s)``, eq. 9 to 11; the masks of the stages multiply, and
    only tokens whose mask is below `SHUT` are left out. At inference tokens above either threshold are kept at their
    original positions. Two losses are added: the gap between mean count and budget, and the number of tokens left at
    late stages, eq. 12 to 14, as fractions of N.

    ``keep`` is the mean count over all layers. With ``adaptive`` it is met on average over images. Without, every image
    meets it: thresholds then decide how the layers share it, as far as it can be spent by counts that do not increase.
    Outside the decoder exactly ``keep`` tokens are kept.

    No official code was found; the equations are those that others reconstructed. Our readings: attention relative to
    its maximum; several grid ratios; thresholds on logarithms, ``M = sigmoid((log S - log theta) / softness)``, which
    select the same tokens and suit long-tailed scores; a head that predicts the share of tokens above the first
    threshold, so that it starts at what the budget implies and one plug-in serves many budgets; and `effective_share`
    times a fixed ``lean`` as the only input that depends on the image. Heads that read the scores themselves learned
    equal counts for all images, because eq. 13 penalises whatever raises the mean of a batch. Our additions:
    ``residual``, a learned factor on ``S``, since on a frozen model thresholds cannot change the order of tokens; and
    stages before layer 0, whose attention is computed ahead.

    Source: ATP-LLaVA, arXiv 2412.00447.
    """

    name = "atp"
    kind = "select"
    site = "decoder"
    signals = frozenset({"image_rows", "text_rows", "place", "gate"})
    trained = True
    adaptive_count = True
    paper = "ATP-LLaVA, arXiv 2412.00447"
    config_class = ATPConfig
    smallest = ATPConfig(width=8)

    def __init__(self, config: ATPConfig | None = None) -> None:
        super().__init__(config)
        chosen = self.config
        if len(chosen.softness) != 2:
            raise UserError(f"atp: softness={chosen.softness}: give the first and the last")
        if chosen.cross == "last":
            self.signals = self.signals - {"text_rows"} | {"last"}
        self.heads = nn.ModuleList(Head(chosen.width) for _ in chosen.sites)
        self.factors = nn.ParameterList(torch.zeros(chosen.hidden_size) for _ in chosen.sites if chosen.residual)

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """Counts of a constant ratio per stage, with the mean ``keep`` over the layers."""
        return geometric_schedule_for_mean(self.config.sites, depth, tokens, keep)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Soft masks in training, otherwise the tokens above their thresholds."""
        course, count = tokens.course, tokens.count
        if course is None:
            margin = self.margin(tokens, 0, keep / count, keep / count)
            kept_indices, valid = ragged_topk(margin, torch.full((len(margin),), keep, device=margin.device))
            return Reduction(kept_indices, valid=valid, scores=margin)
        stages = self.stages(course.depth, course.tokens, course.keep)
        layers, meant = [*stages, course.depth], [course.tokens, *stages.values()]
        site = layers.index(tokens.layer)
        here, later = layers[site + 1] - tokens.layer, course.depth - layers[site + 1]
        left = (course.keep * course.depth - course.spent).detach()
        margin = self.margin(tokens, site, meant[site + 1] / meant[site], course.keep / course.tokens)
        if course.progress is not None:
            return self.soft(tokens, course, margin, later == 0)
        wanted = (margin > 0).sum(1)
        counts = wanted if self.config.adaptive else feasible_count(wanted, left, here, later)
        kept_indices, valid = ragged_topk(margin, counts.clamp(1, count))
        return Reduction(kept_indices, valid=valid, scores=margin)

    def own_loss(self, name: str, rows: Tensor, count: int) -> Tensor:
        """``target``, eq. 13: deviation of the mean count of the batch from the budget."""
        return self.config.target * rows.mean().abs() if name == "target" else super().own_loss(name, rows, count)

    def margin(self, tokens: VisualTokens, site: int, part: float, share: float) -> Tensor:
        """Logarithmic margin by which a token exceeds the nearer of its two thresholds ``[B, N]``; positive is kept.

        Args:
            tokens: The tokens.
            site: Index of the stage.
            part: Ratio of the present tokens that are intended to stay.
            share: Budget as a fraction of N.
        """
        gate, like = tokens.signal("gate"), tokens.features
        cross = tokens.signal("last") if self.config.cross == "last" else _received(tokens)
        own, cross = max_normalize(tokens.signal("image_rows").sum(1)), max_normalize(cross)
        more, bar = self.heads[site](like.new_tensor([[math.log(share)]])).unbind(1)  # the same for every image
        if site == 0:
            # The logarithm is 0 for attention spread over half of the tokens.
            more = more + self.config.lean * (2 * effective_share(cross, gate)).log()
        red = ((own + cross) / 2).clamp_min(NONE).log()
        if self.config.residual:
            red = red + rms_normalize(like) @ self.factors[site]
        stay = torch.sigmoid(more + math.log(part / max(1 - part, EDGE)))
        theta = mass_threshold(red, gate, stay * gate.sum(1))
        spatial = grid_scores(tokens.signal("place"), tokens.grid).clamp_min(NONE).log()
        return torch.maximum(red - theta[:, None], spatial - F.logsigmoid(bar)[:, None])

    def soft(self, tokens: VisualTokens, course: Course, margin: Tensor, deepest: bool) -> Reduction:
        """Soft mask of this stage on all tokens that are not closed, and the losses of the method."""
        assert course.progress is not None
        first, last = self.config.softness
        mask = torch.sigmoid(margin / anneal(first, last, course.progress))
        through = tokens.signal("gate") * mask
        now = through.sum(1)
        losses = {"deep": self.config.deep * tokens.layer / course.depth * now / course.tokens}
        if deepest:
            mean = (course.spent + now * (course.depth - tokens.layer)) / course.depth
            losses["target"] = (mean - course.keep) / course.tokens
        kept_indices, valid = ragged_topk(through.detach(), (through > SHUT).sum(1).clamp(min=1))
        return Reduction(kept_indices, valid=valid, scores=margin, gate=mask.gather(1, kept_indices), losses=losses)


def _received(tokens: VisualTokens) -> Tensor:
    """Attention ``[B, N]`` received from all text tokens of the prompt."""
    rows, real = tokens.signal("text_rows"), tokens.signal("text_mask")
    return rows.masked_fill(~real.bool()[..., None], 0).sum(1)


class Head(nn.Module):
    """Maps the budget to the log-odds of two thresholds.

    Initialised to the intended share of tokens and to a spatial threshold above every grid score.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(1, width), nn.Linear(width, 2)
        nn.init.zeros_(self.outer.weight)
        with torch.no_grad():
            self.outer.bias.copy_(torch.tensor([0.0, 3.0]))

    def forward(self, read: Tensor) -> Tensor:
        """``[1, 2]`` from the logarithm of the budget as a fraction of N ``[1, 1]``."""
        bars: Tensor = self.outer(F.gelu(self.inner(read)))
        return bars
