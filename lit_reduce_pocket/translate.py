"""Stage 4: the projector learns to say in the decoder's words what the tower sees, on features made once.

Directions of the tower's last layer differ in scale by far more than one learning rate can serve: the projector learns
on whitened features, and the whitening is then folded into its first matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from lit_reduce_pocket.loop import Losses, quick
from lit_reduce_pocket.symbols import Symbols
from lit_reduce_pocket.tower import picture_batch, picture_hidden
from lit_reduce_pocket.world import GRID

TOKENS = 2048  # of one step
FLOOR = 1e-5  # smallest variance that is whitened, relative to the largest

Features = tuple[Tensor, Tensor, Tensor]


class Whitened(nn.Module):
    """The projector behind a whitening of its input, which does nothing until `start`."""

    mean: Tensor
    whiten: Tensor

    def __init__(self, projector: Any) -> None:
        super().__init__()
        self.projector = projector
        width = projector.linear_1.in_features
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whiten", torch.eye(width))

    @torch.no_grad()
    def start(self, features: Tensor) -> None:
        """Measures the whitening on features [M, D] and starts the projector anew behind it."""
        self.mean.copy_(features.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov(features.T).double())
        self.whiten.copy_(vectors / (values + values.max() * FLOOR).sqrt())
        seeded = torch.Generator(features.device).manual_seed(0)
        for linear in (self.projector.linear_1, self.projector.linear_2):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=seeded)
            nn.init.zeros_(linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Maps features [..., D] of the tower to tokens of the decoder [..., E]."""
        with torch.autocast(features.device.type, enabled=False):  # small directions would drown in its rounding
            white = (features.float() - self.mean) @ self.whiten
        out: Tensor = self.projector(white)
        return out


def wear(model: LlavaForConditionalGeneration) -> Whitened:
    """Puts a whitening before the projector of a model; returns both."""
    worn = Whitened(model.model.multi_modal_projector)
    model.model.multi_modal_projector = worn
    return worn


@torch.no_grad()
def fold(model: LlavaForConditionalGeneration) -> None:
    """Puts the whitening into the projector's first matrix, so that the plain projector does the same."""
    worn = model.model.multi_modal_projector
    first = worn.projector.linear_1
    first.weight.copy_(first.weight @ worn.whiten.T)
    first.bias.sub_(first.weight @ worn.mean)
    model.model.multi_modal_projector = worn.projector


@torch.no_grad()
def features_of(
    model: LlavaForConditionalGeneration, symbols: Symbols, device: torch.device, pictures: int, scenes: int = 16
) -> Features:
    """Runs the tower on training pictures once.

    Returns:
        features [M, D] of its last layer, the sums of words [M, E] that they shall become, and the weight of each, by
        which patches with print, other things and nothing count the same.
    """
    seen, goals, groups = [], [], []
    for step in tqdm(range(pictures // scenes), desc="features", mininterval=5):
        batch = {k: v.to(device) for k, v in picture_batch(step, scenes).items()}
        with quick(device):
            seen.append(picture_hidden(model, batch["pictures"])[:, 1:].flatten(0, 1).float())
        where = torch.arange(GRID * GRID, device=device).expand(scenes, -1)
        goals.append(symbols(model.get_input_embeddings(), batch, where).flatten(0, 1))
        printed = (batch["first"] > 0) | (batch["word"] > 0)
        groups.append(torch.where(printed, 2, (batch["kind"] > 0).long()).flatten())
    group = torch.cat(groups)
    share = group.bincount(minlength=3) / len(group)
    return torch.cat(seen), torch.cat(goals), 1 / (3 * share)[group]


def token_batch(step: int, pictures: int) -> Tensor:
    """Draws the tokens of one step out of those of so many pictures."""
    return torch.randint(pictures * GRID * GRID, (TOKENS,), generator=torch.Generator().manual_seed(step))


def translation_loss(
    model: LlavaForConditionalGeneration, symbols: Symbols, device: torch.device, pictures: int
) -> Callable[[Any, int], Losses]:
    """Returns the loss of a batch of indices: the weighted share of the words that the projector does not say.

    The features of all pictures are made at the first call, a gigabyte for 1,000 pictures.
    """
    made: list[Features] = []

    def loss_of(batch: Tensor, step: int) -> Losses:
        worn: Whitened = model.model.multi_modal_projector
        if not made:
            seen, goals, weights = features_of(model, symbols, device, pictures)
            made.append((seen, goals, weights / goals.var()))
        seen, goals, weights = made[0]
        if step == 0:
            worn.start(seen)
        batch = batch.to(device)
        with torch.autocast(device.type, enabled=False):
            gap = (worn(seen[batch]) - goals[batch]).square().mean(-1)
        return {"loss": (gap * weights[batch]).mean()}

    return loss_of
