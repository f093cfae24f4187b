"""Comparing: the decoder is asked how far apart two things are, besides which answer follows.

Whether one thing is left of another is a product of two facts, which side is asked about and how far apart they are,
and neither says anything by itself: from the answers alone the decoder guesses for thousands of questions. Asked for
the distances themselves, it has them within two hundred steps, and the answers follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from lit_reduce_pocket.guidance import ANSWERING
from lit_reduce_pocket.loop import Losses

APART, GAP = ANSWERING[-1], ANSWERING[-1] + 1  # behind these decoder layers the distances are read


class Distances(nn.Module):
    """Read-outs of states [.., width]: columns and rows between two things, and how far along the side asked for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, elementwise_affine=False)
        self.apart = nn.Linear(width, 2)
        self.gap = nn.Linear(width, 1)


def compared_spots(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns which tokens [B, T] answer about two things, and how far these are apart, [M, 2] from -2 to 2."""
    about = (batch["compared"] >= 0).all(-1) & (batch["targets"] >= 0)
    which, name = about.nonzero()[:, :1], batch["compared"][about]
    spots = batch["spot"][which, name]
    return about, spots[:, 0] - spots[:, 1]


@contextmanager
def outputs_of(model: LlavaForConditionalGeneration, indices: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Inside the block the outputs of these decoder layers are kept; behind it the model is as it was."""
    states: dict[int, Tensor] = {}
    layers = model.get_decoder().layers
    hooks = [layers[i].register_forward_hook(lambda _, __, out, i=i: states.__setitem__(i, out)) for i in indices]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def comparing(
    model: LlavaForConditionalGeneration, distances: Distances, answers: Callable[[Any, int], Losses]
) -> Callable[[Any, int], Losses]:
    """Returns ``answers``, the loss of a batch with packed turns at the end of its sequences, and of the distances."""

    def loss_of(batch: dict[str, Tensor], step: int) -> Losses:
        with outputs_of(model, (APART, GAP)) as states:
            losses = answers(batch, step)
        batch = {k: v.to(losses["loss"].device) for k, v in batch.items()}
        about, apart = compared_spots(batch)
        length, many = about.shape[1], max(1, len(apart))
        far, gap = (distances.norm(states[i][:, -length:][about].float()) for i in (APART, GAP))
        losses["apart"] = (distances.apart(far) - apart).square().sum() / many
        losses["gap"] = (distances.gap(gap)[:, 0] - batch["gap"][about]).square().sum() / many
        return {**losses, "loss": losses["loss"] + losses["apart"] + losses["gap"]}

    return loss_of
