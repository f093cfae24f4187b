"""Stage 1: the tower learns to say what every patch shows, first on small windows, then on whole pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from lit_reduce.pocket.labels import SIZES, patch_labels
from lit_reduce.pocket.loop import Losses, quick
from lit_reduce.pocket.model import normalise, patches_of, tower_forward, vision_tower
from lit_reduce.pocket.render import render
from lit_reduce.pocket.words import COLORS, PRINTED, SHAPES
from lit_reduce.pocket.world import GRID, JITTER, PATCH, Scene, make_scene, scene_rng

WINDOW = 6  # patches a side: 36 + CLS tokens instead of 577
WHOLE = len(SHAPES) * len(COLORS) + len(PRINTED)  # what CLS is asked: which coloured shapes and words are there
PLACE = 10  # weight of the place among the losses of the tower


class Heads(nn.Module):
    """Linear read-outs of the tower: one a field for patches and one for where they are, one for CLS."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fields = nn.ModuleDict({field: nn.Linear(width, n) for field, n in SIZES.items()})
        self.place = nn.Linear(width, 2)
        self.whole = nn.Linear(width, WHOLE)

    def forward(self, hidden: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Reads [B, 1 + P, D]; returns field -> [B, P, classes] and the CLS logits [B, WHOLE]."""
        hidden = self.norm(hidden)
        return {f: head(hidden[:, 1:]) for f, head in self.fields.items()}, self.whole(hidden[:, 0])


def place_loss(heads: Heads, hidden: Tensor, where: Tensor) -> Tensor:
    """Asks patches for their column and row, from -1 to 1: a tower that need not say where it looks forgets it.

    Args:
        heads: The read-outs.
        hidden: [B, 1 + P, D], CLS first.
        where: [B, P] raster indices of the patches.

    Returns:
        The mean squared distance, a scalar.
    """
    said = heads.place(heads.norm(hidden[:, 1:])).float()
    spot = torch.stack([where % GRID, where // GRID], -1) * (2 / (GRID - 1)) - 1
    loss: Tensor = (said - spot).square().sum(-1).mean()
    return loss


def cls_labels(scene: Scene) -> np.ndarray:
    """Returns the multi-hot [WHOLE] of coloured shapes and printed words in a scene."""
    out = np.zeros(WHOLE, np.float32)
    for t in scene.things:
        if t.kind == "shape":
            out[SHAPES.index(t.shape) * len(COLORS) + list(COLORS).index(t.color)] = 1
        elif t.word:
            out[len(SHAPES) * len(COLORS) + PRINTED.index(t.word)] = 1
    return out


def window_batch(step: int, scenes: int = 8, each: int = 8, jitter: float = JITTER) -> dict[str, Tensor]:
    """Makes a batch of 6 x 6-patch windows, most of them around a thing, those with print three times as often.

    Args:
        step: Of the loop.
        scenes: That the windows are cut from.
        each: Windows of a scene.
        jitter: See `make_scene`.
    """
    cells = np.arange(WINDOW)
    out: dict[str, list[np.ndarray]] = {}
    for i in range(scenes):
        index = step * scenes + i
        scene = make_scene("train", index, jitter)
        rng = scene_rng("train", index, 1)
        pixels = np.asarray(render(scene)).reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 1, 3, 4)
        labels = patch_labels(scene)
        weight = np.array([3.0 if t.number or t.word else 1.0 for t in scene.things])
        for _ in range(each):
            thing = scene.things[int(rng.choice(len(weight), p=weight / weight.sum()))]
            spot = np.array([thing.y, thing.x]) / PATCH - WINDOW / 2 + rng.uniform(-1.5, 1.5, 2)
            if rng.random() < 0.1:
                spot = rng.uniform(0, GRID - WINDOW, 2)
            top, left = np.clip(np.round(spot), 0, GRID - WINDOW).astype(int)
            where = ((top + cells)[:, None] * GRID + left + cells).reshape(-1)
            out.setdefault("pixels", []).append(pixels.reshape(GRID * GRID, PATCH, PATCH, 3)[where])
            out.setdefault("positions", []).append(where)
            for field, values in labels.items():
                out.setdefault(field, []).append(values[where])
    return {k: torch.from_numpy(np.stack(v)) for k, v in out.items()}


def picture_batch(step: int, scenes: int, split: str = "train", jitter: float = JITTER) -> dict[str, Tensor]:
    """Makes a batch of whole pictures with their dense labels; `jitter`: see `make_scene`."""
    out: dict[str, list[np.ndarray]] = {}
    for i in range(scenes):
        scene = make_scene(split, step * scenes + i, jitter)
        out.setdefault("pictures", []).append(np.asarray(render(scene)))
        out.setdefault("whole", []).append(cls_labels(scene))
        for field, values in patch_labels(scene).items():
            out.setdefault(field, []).append(values)
    return {k: torch.from_numpy(np.stack(v)) for k, v in out.items()}


def window_patches(pixels: Tensor) -> Tensor:
    """Maps uint8 patches [B, P, 14, 14, 3] to normalised ones [B, P, 588]."""
    b, p = pixels.shape[:2]
    flat = normalise(pixels.flatten(0, 1))
    return flat.reshape(b, p, -1)


def dense_loss(logits: dict[str, Tensor], batch: dict[str, Tensor]) -> Losses:
    """Cross-entropy of every field; patches that show something and patches that don't weigh the same."""
    out: Losses = {}
    for field, value in logits.items():
        target = batch[field].to(value.device).flatten()
        each = F.cross_entropy(value.float().flatten(0, 1), target, reduction="none")
        some = target > 0
        out[field] = (each * some).sum() / some.sum().clamp(min=1) + (each * ~some).sum() / (~some).sum().clamp(min=1)
    weight = {"first": 1.5, "second": 1.5, "word": 1.5, "size": 0.5, "centre": 0.5}
    out["loss"] = torch.stack([weight.get(f, 1.0) * v for f, v in out.items()]).sum()
    return out


def accuracies(logits: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, float]:
    """Returns per field the share of right patches among those that show something."""
    out = {}
    for field, value in logits.items():
        target = batch[field].to(value.device)
        right = value.argmax(-1) == target
        out[f"acc_{field}"] = float(right[target > 0].float().mean())
    return out


@torch.no_grad()
def whiten(model: LlavaForConditionalGeneration, scenes: int = 64, floor: float = 3e-3) -> None:
    """Starts the patch embedding at the principal components of real patches, each scaled to the same size.

    Strokes and edges carry a thousandth of the variance of a patch's mean colour; whitened, they are seen from the
    first step on.
    """
    stem = vision_tower(model).embeddings.patch_embedding.weight
    pictures = np.stack([np.asarray(render(make_scene("train", i))) for i in range(scenes)])
    patches = patches_of(normalise(torch.from_numpy(pictures))).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    width = stem.shape[0]
    top = vectors[:, -width:] / (values[-width:] + floor).sqrt()
    stem.copy_(0.5 * top.T.reshape(stem.shape).float())


def window_loss(
    model: LlavaForConditionalGeneration, heads: Heads, device: torch.device
) -> Callable[[Any, int], Losses]:
    """Returns the loss of a window batch."""

    def loss_of(batch: dict[str, Tensor], _: int) -> Losses:
        where = batch["positions"].to(device)
        hidden = tower_forward(model, window_patches(batch["pixels"].to(device)), where)
        losses = dense_loss(heads(hidden)[0], batch)
        losses["place"] = PLACE * place_loss(heads, hidden, where)
        return {**losses, "loss": losses["loss"] + losses["place"]}

    return loss_of


def picture_hidden(model: LlavaForConditionalGeneration, pictures: Tensor) -> Tensor:
    """Runs the tower on whole uint8 pictures [B, 336, 336, 3]; returns [B, 577, D]."""
    patches = patches_of(normalise(pictures))
    return tower_forward(model, patches, torch.arange(GRID * GRID, device=patches.device).expand(len(patches), -1))


@torch.no_grad()
def validate(
    model: LlavaForConditionalGeneration, heads: Heads, device: torch.device, pictures: int = 64
) -> dict[str, float]:
    """Returns the field accuracies on whole validation pictures."""
    sums: dict[str, float] = {}
    for step in range(pictures // 16):
        batch = picture_batch(step, 16, "val")
        with quick(device):
            logits, _ = heads(picture_hidden(model, batch["pictures"].to(device)))
        for k, v in accuracies(logits, batch).items():
            sums[k] = sums.get(k, 0.0) + v / (pictures // 16)
    return sums
