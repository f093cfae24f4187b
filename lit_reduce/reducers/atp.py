"""ATP-LLaVA: small heads between decoder layers decide for every image, and every question, how much is left of it."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_reduce.errors import UserError
from lit_reduce.ops.budgets import falling_average
from lit_reduce.ops.gates import anneal
from lit_reduce.ops.similarity import normal
from lit_reduce.ops.thresholds import NONE, affordable, best, breadth, mass_above, peaked, pyramid
from lit_reduce.reducer import Reducer, ReducerConfig, register
from lit_reduce.tokens import Course, Reduction, VisualTokens

EDGE = 1e-3
SHUT = 1e-3  # tokens that are attended to less than that need not be carried along in training


def _sites() -> list[float]:
    return [0.125, 0.4375, 0.75]


@dataclass
class ATPConfig(ReducerConfig):
    """Where it acts, its size, and what training asks of it beside the answers."""

    hidden_size: int = field(default=0, metadata={"help": "width of the backbone's visual tokens; set when training"})
    sites: list[float] = field(
        default_factory=_sites, metadata={"help": "where, as parts of the depth (4, 14, 24 of 32); 0: before layer 0"}
    )
    width: int = field(default=64, metadata={"help": "width inside each head"})
    cross: str = field(
        default="text", metadata={"help": "whose attention is the cross-modal score", "choices": ("text", "last")}
    )
    residual: bool = field(default=True, metadata={"help": "whether a learned map of the tokens weighs their scores"})
    adaptive: bool = field(
        default=True, metadata={"help": "whether thresholds decide, and keep is met on average only"}
    )
    lean: float = field(
        default=1.0, metadata={"help": "how much more stays at the first site where words look at more; 0: no more"}
    )
    target: float = field(default=2.0, metadata={"help": "weight of the gap between mean count and budget"})
    deep: float = field(default=0.0, metadata={"help": "weight of the tokens left at each site, the later the more"})
    softness: list[float] = field(
        default_factory=lambda: [0.3, 0.02], metadata={"help": "of the mask when training begins and ends"}
    )


@register
class ATP(Reducer):
    """A token stays if it is important (redundancy test) or lies on a sparse grid (spatial test); heads set both bars.

    Scores: attention that a token receives from tokens of the image, and from the prompt, each as part of its maximum,
    and their mean ``S``; the spatial score of `pyramid`. Two thresholds, eq 6 to 8, come of a head and of how many
    tokens the question looks at (`breadth`). In training later layers attend to a token by ``M = max(M_r, M_s)``,
    eq 9 to 11, and stages multiply; only tokens as good as shut are left out. Inference keeps what is above either
    threshold, at its original position. Further losses: the mean count against the budget, and a price for what is left
    late, eq 12 to 14, in parts of N.

    No official code was found: the equations are those that others rebuilt. Our reading: the maximum as the unit,
    several rates; that both tests compare logarithms, ``M = sigmoid((log S - log theta) / softness)``, which decides
    the same and suits scores with a long tail; that a head says which part of the tokens is to be above the first
    threshold, so that it starts from what the budget asks and one plug-in serves many budgets; and that its only
    knowledge of the image is `breadth`, times a fixed ``lean``. Heads that read the scores themselves learned to make
    all counts alike, since eq 13 pulls at whatever lifts the mean of a batch. Ours alone: `residual`, from which ``S``
    gets a factor, since behind a frozen model thresholds cannot change the order of tokens, and sites before layer 0,
    whose attention is read ahead.

    ``keep`` is the mean over all layers. With ``adaptive`` it is met on average over images; without, by every image:
    thresholds still say how the layers share it, as far as it can be spent without a rise. Outside a language model's
    layers exactly ``keep`` tokens stay.

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
        if not chosen.sites or not all(0 <= share < 1 for share in chosen.sites):
            raise UserError(f"atp: sites={chosen.sites}: give parts of the depth from 0 to below 1")
        if len(chosen.softness) != 2 or min(chosen.softness) <= 0:
            raise UserError(f"atp: softness={chosen.softness}: give the first and the last, both above 0")
        if chosen.cross == "last":
            self.signals = self.signals - {"text_rows"} | {"last"}
        self.heads = nn.ModuleList(Head(chosen.width) for _ in chosen.sites)
        self.factors = nn.ParameterList(torch.zeros(chosen.hidden_size) for _ in chosen.sites if chosen.residual)

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        """What would stay of an image if every site left the same part; the mean over layers is ``keep``."""
        return falling_average(self.config.sites, depth, tokens, keep)

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        """Soft masks while training, else the tokens above their thresholds."""
        course, count = tokens.course, tokens.count
        if course is None:
            margin = self.margin(tokens, 0, keep / count, keep / count)
            kept_indices, valid = best(margin, torch.full((len(margin),), keep, device=margin.device))
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
        counts = wanted if self.config.adaptive else affordable(wanted, left, here, later)
        kept_indices, valid = best(margin, counts.clamp(1, count))
        return Reduction(kept_indices, valid=valid, scores=margin)

    def own_loss(self, name: str, rows: Tensor, count: int) -> Tensor:
        """``target``, eq 13: by how much the mean count of the whole batch misses the budget."""
        return self.config.target * rows.mean().abs() if name == "target" else super().own_loss(name, rows, count)

    def margin(self, tokens: VisualTokens, site: int, part: float, share: float) -> Tensor:
        """By how much the better test is passed, ``[B, N]`` in logarithms; above 0 stays.

        Args:
            tokens: The tokens.
            site: Which of the sites.
            part: Of the tokens that are there, how many are meant to stay.
            share: The budget in parts of N.
        """
        gate, like = tokens.signal("gate"), tokens.features
        cross = tokens.signal("last") if self.config.cross == "last" else _received(tokens)
        own, cross = peaked(tokens.signal("image_rows").sum(1)), peaked(cross)
        more, bar = self.heads[site](like.new_tensor([[math.log(share)]])).unbind(1)  # the same for every image
        if site == 0:
            more = more + self.config.lean * (2 * breadth(cross, gate)).log()  # 0 where they look at half of the tokens
        red = ((own + cross) / 2).clamp_min(NONE).log()
        if self.config.residual:
            red = red + normal(like) @ self.factors[site]
        stay = torch.sigmoid(more + math.log(part / max(1 - part, EDGE)))
        theta = mass_above(red, gate, stay * gate.sum(1))
        spatial = pyramid(tokens.signal("place"), tokens.grid).clamp_min(NONE).log()
        return torch.maximum(red - theta[:, None], spatial - F.logsigmoid(bar)[:, None])

    def soft(self, tokens: VisualTokens, course: Course, margin: Tensor, deepest: bool) -> Reduction:
        """The mask of this stage on all tokens that it lets through at all, and the method's own losses."""
        assert course.progress is not None
        first, last = self.config.softness
        mask = torch.sigmoid(margin / anneal(first, last, course.progress))
        through = tokens.signal("gate") * mask
        now = through.sum(1)
        losses = {"deep": self.config.deep * tokens.layer / course.depth * now / course.tokens}
        if deepest:
            mean = (course.spent + now * (course.depth - tokens.layer)) / course.depth
            losses["target"] = (mean - course.keep) / course.tokens
        kept_indices, valid = best(through.detach(), (through > SHUT).sum(1).clamp(min=1))
        return Reduction(kept_indices, valid=valid, scores=margin, gate=mask.gather(1, kept_indices), losses=losses)


def _received(tokens: VisualTokens) -> Tensor:
    """Attention ``[B, N]`` from all words of the prompt together."""
    rows, real = tokens.signal("text_rows"), tokens.signal("text_mask")
    return rows.masked_fill(~real.bool()[..., None], 0).sum(1)


class Head(nn.Module):
    """From the budget: how many more tokens than meant, and the spatial bar, as log-odds.

    It starts with as many as meant, and a bar above every grid.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(1, width), nn.Linear(width, 2)
        nn.init.zeros_(self.outer.weight)
        with torch.no_grad():
            self.outer.bias.copy_(torch.tensor([0.0, 3.0]))

    def forward(self, read: Tensor) -> Tensor:
        """``[1, 2]`` of the logarithm of the budget ``[1, 1]``, in parts of N."""
        bars: Tensor = self.outer(F.gelu(self.inner(read)))
        return bars
