"""Learning rate finder: trains a copy of the reducer at rising rates, and suggests where the loss falls fastest."""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lit_reduce.console import columns
from lit_reduce.distill.data import DistillData
from lit_reduce.distill.module import Distiller
from lit_reduce.files import atomic_path
from lit_reduce.reducer import Reducer
from lit_reduce.settings.train import TrainSettings

LOWEST, HIGHEST, STEPS = 1e-5, 1.0, 60
SMOOTH, WORSE = 0.8, 4.0  # share of the past in the smoothed loss; a sweep ends at so many times the best


@dataclass
class LearningRateFinder:
    """The result of a sweep.

    Attributes:
        rates: Learning rate of each step.
        losses: Loss before each step.
        smooth: The same as a moving average.
        best: The rate at which the smoothed loss falls fastest; None when it never falls.
    """

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    best: float | None


def sweep(settings: TrainSettings, model: Any, reducer: Reducer, data: DistillData) -> LearningRateFinder:
    """Trains a copy of the reducer at rates that rise by equal factors (Smith, arXiv 1506.01186).

    Every step has the losses, weights and the budget of the first step of stage 2: the steps of a run would mix stages
    and budgets into the curve, which is also why Lightning's tuner does not serve here. The reducer, the trainer and
    the checkpoints are left as they are.
    """
    copied = copy.deepcopy(reducer).train()
    module = Distiller(model, copied, replace(settings, curriculum=0.0))
    optimizer = torch.optim.AdamW(copied.parameters(), lr=LOWEST, weight_decay=settings.weight_decay)
    found, mean = LearningRateFinder([], [], [], None), 0.0
    for step in tqdm(range(STEPS), desc="learning rate", unit="step"):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = module.losses(replace(data.batch(step), step=settings.guide_steps))["loss"]
        value = float(loss.detach())
        mean = SMOOTH * mean + (1 - SMOOTH) * value
        average = mean / (1 - SMOOTH ** (step + 1))
        if not math.isfinite(value) or (found.smooth and average > WORSE * min(found.smooth)):
            break
        found.rates.append(rate)
        found.losses.append(value)
        found.smooth.append(average)
        optimizer.zero_grad()
        loss.backward()
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(copied.parameters(), settings.clip)
        optimizer.step()
    found.best = steepest(found.rates, found.smooth)
    return found


def steepest(rates: list[float], losses: list[float], first: int = 5) -> float | None:
    """The rate at which the loss falls fastest, per factor of the rate, on its way to where it is least.

    What it does behind that place is chance: there the rate is too high already. The ``first`` steps, whose average is
    still rough, are left out.

    Returns:
        None when there are too few steps, or the loss never falls.
    """
    least = min(range(len(losses)), key=losses.__getitem__)
    slopes = {
        rates[i]: (losses[i + 1] - losses[i - 1]) / math.log(rates[i + 1] / rates[i - 1])
        for i in range(first, min(least + 1, len(rates) - 1))
    }
    best = min(slopes, key=slopes.__getitem__, default=None)
    return best if best is not None and slopes[best] < 0 else None


def show(found: LearningRateFinder, path: Path) -> str:
    """Draws the sweep to ``path`` (PNG) and returns it as a table with a suggestion."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color="#c4c4c4", lw=1, label="loss")
    axes.plot(found.rates, found.smooth, color="#1f6fb4", lw=2, label="smoothed")
    if found.best is not None:
        axes.axvline(found.best, color="#c23b4a", ls="--", lw=1.2, label=f"steepest: {found.best:.1e}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.grid(color="#dddddd", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png")
    lines = [
        (f"{rate:.1e}", f"{loss:.4f}", f"{average:.4f}")
        for rate, loss, average in list(zip(found.rates, found.losses, found.smooth, strict=True))[::4]
    ]
    advice = "the loss never falls: look at the data and the losses first"
    if found.best is not None:
        advice = f"steepest at learning_rate={found.best:.1e}"
    return columns(("learning rate", "loss", "smoothed"), lines, right=range(3)) + f"{advice}; plot: {path}\n"
