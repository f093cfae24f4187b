"""Random budgets and gate noise, each a function of seed, step and question.

A resumed run therefore draws the same numbers as an uninterrupted one, and n processes draw the same as one process
with n times the pictures.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_reduce.tokens import Budget


def budget_of(
    step: int, seed: int, budgets: Sequence[float], weights: Sequence[float] | None = None, share: float = 1.0,
    tokens: int = 0,
) -> int:  # fmt: skip
    """Draws the budget of a step (elastic: one reducer learns all of them).

    Args:
        step: Of training.
        seed: Of the run.
        budgets: Counts, or ratios of ``tokens``. Their smallest and largest are the ends of a range, drawn from evenly
            on a log scale (our reading).
        weights: With one for each budget, the budgets are a list to choose from, by these (TokenFLEX, arXiv 2504.03154,
            which draws the count of a step from a list; the weights are derived, not read).
        share: How much of the curriculum is done, see `lowered`.
        tokens: Visual tokens of a picture, where the curriculum starts, and of which ratios are taken.
    """
    rng = np.random.default_rng([seed, 3, step])
    budgets = [budget if isinstance(budget, int) else Budget(budget).count(tokens) for budget in budgets]
    if weights is not None:
        drawn = int(rng.choice(np.asarray(budgets), p=np.asarray(weights) / np.sum(weights)))
    else:
        low, high = min(budgets), max(budgets)
        drawn = round(float(np.exp(np.log(low) + rng.random() * (np.log(high) - np.log(low)))))
    return lowered(drawn, share, tokens)


def tokens_of(budget: float, tokens: int) -> int:
    """A budget, count or ratio, of a picture with so many tokens; all of them where it has fewer than a count."""
    return min(budget, tokens) if isinstance(budget, int) else Budget(budget).count(tokens)


def lowered(budget: int, share: float, tokens: int) -> int:
    """A budget on its way down from all ``tokens``, evenly on a log scale, when ``share`` of the way is done.

    LLaVolta (arXiv 2406.20092) trains a language model from few visual tokens to many. With a frozen one there is
    nothing to make cheaper, so the way is turned round: easy first. Its stages are a smooth way here; our reading.
    """
    if share >= 1 or tokens <= budget:
        return budget
    return round(float(np.exp(np.log(tokens) + share * (np.log(budget) - np.log(tokens)))))


def uniform(seed: int, step: int, questions: Tensor, count: int) -> Tensor:
    """Numbers in (0, 1) ``[B, count]``: row i is a function of seed, step and the i-th question's number."""
    rows = [_rng(seed, step, question).random(count) for question in questions.tolist()]
    return torch.from_numpy(np.stack(rows)).float().clamp(1e-7, 1 - 1e-7)


def normal(seed: int, step: int, questions: Tensor, count: int, width: int) -> Tensor:
    """Standard normal numbers ``[B, count, width]``, by rows as in `uniform`."""
    rows = [_rng(seed, step, q).standard_normal((count, width), dtype=np.float32) for q in questions.tolist()]
    return torch.from_numpy(np.stack(rows))


def _rng(seed: int, step: int, question: int) -> np.random.Generator:
    return np.random.default_rng([seed, 4, step, question])
