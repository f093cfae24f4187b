"""Differentiable relaxations of top-k selection: which tokens the decoder reads in training, and their gates."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_reduce.distill.batch import Batch
from lit_reduce.distill.seeded_sampling import normal, uniform
from lit_reduce.ops.gates import anneal, concrete, exact_budget, key_bias, mix_noise
from lit_reduce.reducer import ScoringReducer
from lit_reduce.settings.train import TrainSettings
from lit_reduce.tokens import VisualTokens

FLOOR = 1e-6  # weight of a dropped key in the backward pass, so that its score still gets a gradient


@dataclass
class RelaxedSelection:
    """The tokens that the decoder reads in training, with gradients to the scores.

    Attributes:
        kept_indices: ``[B, M]`` ascending indices of the tokens that enter; all others are dropped.
        gates: ``[B, N]`` soft gates of all tokens.
        bias: ``[B, M]`` added to the attention logits of those keys; None for no bias.
        features: ``[B, N, D]`` tokens to read in place of the batch's; None for those.
    """

    kept_indices: Tensor
    gates: Tensor
    bias: Tensor | None = None
    features: Tensor | None = None


def exact(scores: Tensor, keep: int, tau: float, candidates: int) -> RelaxedSelection:
    """The best ``keep`` tokens, hard; backward, a gate on every key whose sum is exactly ``keep`` (CoViPAL stage 2).

    Args:
        scores: ``[B, N]`` of the reducer.
        keep: K.
        tau: Softness of the gate, in units of the scores' spread.
        candidates: How many tokens enter the decoder, at least ``keep``; the gates of the others are too small to
            matter. N for the full gradient.
    """
    gates, order = _soft(scores, keep, tau), _order(scores)
    hard = torch.zeros_like(gates, dtype=torch.bool).scatter(1, order[:, :keep], True)
    inside = _first(order, max(candidates, keep))
    return RelaxedSelection(inside, gates, key_bias(gates.gather(1, inside), hard.gather(1, inside), floor=FLOOR))


def random(scores: Tensor, keep: int, tau: float, candidates: int, relax: float, chance: Tensor) -> RelaxedSelection:
    """Binary concrete gates on the keys: each token is open at random, ``keep`` of them on average.

    A token's chance is its soft gate of `exact`, so that the budget is met on average without a threshold to learn; our
    reading. What enters are the ``candidates`` widest gates of this very draw.

    Args:
        scores: As in `exact`.
        keep: As in `exact`.
        tau: As in `exact`.
        candidates: As in `exact`.
        relax: Softness of the drawn gates: at 1 half-open ones are common, near 0 they are open or shut.
        chance: ``[B, N]`` uniform numbers.
    """
    gates = concrete(_soft(scores, keep, tau), chance.to(scores.device), relax)
    inside = _first(_order(gates), max(candidates, keep))
    return RelaxedSelection(inside, gates, gates.gather(1, inside).clamp_min(FLOOR).log())


def noisy(features: Tensor, scores: Tensor, keep: int, tau: float, candidates: int, noise: Tensor) -> RelaxedSelection:
    """The best ``candidates`` tokens, each mixed with noise by how far its soft gate of `exact` is closed (AutoSelect).

    Args:
        features: ``[B, N, D]``.
        scores: As in `exact`.
        keep: As in `exact`.
        tau: As in `exact`.
        candidates: As in `exact`; the paper has all tokens enter.
        noise: ``[B, M, D]`` standard normal numbers for the M tokens that enter.
    """
    gates, size = _soft(scores, keep, tau), features.square().mean(1, keepdim=True).sqrt()
    inside = _first(_order(scores), max(candidates, keep))
    index = inside[..., None].expand(-1, -1, features.shape[-1])
    made = mix_noise(features.gather(1, index), gates.gather(1, inside), size * noise.to(features))
    return RelaxedSelection(inside, gates, features=features.scatter(1, index, made))


def with_rest(
    gated: RelaxedSelection, reducer: ScoringReducer, tokens: VisualTokens, scores: Tensor, keep: int
) -> RelaxedSelection:
    """Adds the reducer's summary tokens, whose gates are always open; nothing where it makes none.

    Args:
        gated: Of the tokens that the reducer chooses among.
        reducer: Makes them of what it would drop.
        tokens: What it sees.
        scores: ``[B, N]`` of it.
        keep: All tokens of the budget.
    """
    summary_count = reducer.summary_count(keep)
    if not summary_count:
        return gated
    kept = _order(scores)[:, : keep - summary_count]
    kept_indices, features = reducer.with_summary(tokens, scores, kept, gated.kept_indices, summary_count)
    if gated.features is not None:
        made = torch.zeros_like(scores, dtype=torch.bool).scatter(1, kept_indices[:, -summary_count:], True)
        features = torch.where(made[..., None], features, gated.features.to(features))
    kept_indices, order = kept_indices.sort(1)
    bias = None if gated.bias is None else torch.nn.functional.pad(gated.bias, (0, summary_count)).gather(1, order)
    return RelaxedSelection(kept_indices, gated.gates, bias, features)


def _exact(_: Batch, scores: Tensor, keep: int, candidates: int, settings: TrainSettings) -> RelaxedSelection:
    return exact(scores, keep, settings.tau, candidates)


def _concrete(batch: Batch, scores: Tensor, keep: int, candidates: int, settings: TrainSettings) -> RelaxedSelection:
    done = (batch.step - settings.guide_steps) / max(1, settings.steps - settings.guide_steps)
    relax = anneal(settings.relax[0], settings.relax[-1], done)
    chance = uniform(settings.seed, batch.step, batch.numbers, scores.shape[1])
    return random(scores, keep, settings.tau, candidates, relax, chance)


def _noise(batch: Batch, scores: Tensor, keep: int, candidates: int, settings: TrainSettings) -> RelaxedSelection:
    count = min(max(candidates, keep), scores.shape[1])
    noise = normal(settings.seed, batch.step, batch.numbers, count, batch.features.shape[-1])
    return noisy(batch.features, scores, keep, settings.tau, candidates, noise)


GATES: dict[str, Callable[[Batch, Tensor, int, int, TrainSettings], RelaxedSelection]] = {
    "exact": _exact,
    "concrete": _concrete,
    "noise": _noise,
}
"""By the word that the setting ``gate`` takes: batch, scores, budget, candidates, settings -> gates of this step."""


def _soft(scores: Tensor, keep: int, tau: float) -> Tensor:
    spread = scores.detach().float().std(-1, keepdim=True).clamp_min(1e-3)
    return exact_budget(scores.float() / spread, keep, tau)


def _order(values: Tensor) -> Tensor:
    return values.detach().sort(dim=-1, descending=True, stable=True).indices


def _first(order: Tensor, count: int) -> Tensor:
    return order[:, : min(count, order.shape[1])].sort(-1).values
