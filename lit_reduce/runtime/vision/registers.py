"""Registers inside the vision tower: more rows, which see the patches and are never seen by them.

The patches' pass stays the model's own, bit for bit: after each block the registers alone run through the same code,
their queries before the keys and values that the patches just had, and their own. No mask is needed, and fast kernels
stay in use. One pass gives both: what the projector makes of the patches is the teacher's, and the tokens are made of
that and of the registers. They take the place of the others where the projector's tokens go straight to the language
model (LLaVA-1.5, PaliGemma); where these are put together from tiles (LLaVA-NeXT, LLaVA-OneVision) they stand at the
patches that they are for until then, and the language model gets those alone.

A reducer of kind ``register`` at the site ``encoder`` says by `Reducer.stages` before which block they join, and gives
them by `Reducer.reduce` of the patches there. Beside these it has ``adapt(block, part, x, y)``, which may change what
the parts ``q``, ``k``, ``v``, ``o`` and ``mlp`` of a block give for registers, ``together(block, x, tiles)``, which may
change what attention gave them by the other tiles of their image, and ``leave(x, y, pooled)``, the tokens, from
registers, projected registers, and the mean of the projected patches of each.
"""

from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lit_reduce.backbones.families import Family
from lit_reduce.backbones.layouts import AnyRes, Inputs, Layout, Plain
from lit_reduce.backbones.towers import part
from lit_reduce.errors import UserError
from lit_reduce.ops.mergers import merge_mean
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.attention.probe import AttentionCall, AttentionProbe, View, attend
from lit_reduce.runtime.call import call_reducer, now
from lit_reduce.runtime.patches import Patches
from lit_reduce.runtime.vision.base import TowerHooks
from lit_reduce.tokens import Budget, Reduction, VisualTokens

LINEAR = {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": ("out_proj", "o_proj")}


class Registers(TowerHooks):
    """Runs registers beside the patches of a tower that takes images (tiles) of one size as a batch.

    Attributes:
        teacher: ``[T, N, D]``, what the projector last made of the patches, as without registers.
        rows: ``[T, K, C]``, the registers; None while the pass goes on without them.
        tiles: How many tiles belong to each image of the next pass. Each is an image when None.
        owners: For each image of the last pass ``[n_i]``, which of its registers each visual token went into, or -1.
    """

    def __init__(self, model: Any, family: Family, reducer: Reducer, keep: Budget) -> None:
        if family.row(model) is not None or not isinstance(family.layouts["image"], Plain | AnyRes):
            raise UserError(
                f"'{reducer.name}' adds registers to the vision tower, but '{family.name}' packs its images into one "
                "row or mixes neighbouring patches before its projector; use a reducer that selects"
            )
        super().__init__(model, reducer, keep)
        if self.tower.prefix and getattr(model.config, "vision_feature_select_strategy", "default") == "full":
            raise UserError(f"'{reducer.name}' adds registers to the vision tower, but this model reads CLS as a patch")
        self.short = family.tokenwise
        self.teacher: Tensor | None = None
        self.rows: Tensor | None = None
        self.tiles: list[int] | None = None
        self._first, self._at = 0, -1  # the block before which registers join; the one that they are in
        self._joined: Reduction | None = None
        self._entry = family.projector(model)

    def prepare(self, layout: Layout, inputs: Inputs) -> None:
        """See `TowerHooks`: the number of tiles of each image."""
        self.tiles = layout.tiles(self.model, inputs) if isinstance(layout, AnyRes) else None

    def _patch(self, patches: Patches) -> None:
        super()._patch(patches)
        for number, block in enumerate(self.tower.blocks):
            if number >= self.tower.depth:
                continue
            attention = self.tower.attention(number)
            patches.replace_forward(block, partial(self._block, number))
            patches.replace_forward(attention, partial(self._attention, number))
            patches.replace_forward(self.tower.mlp(number), partial(self._part, number, "mlp"))
            for name, names in LINEAR.items():
                patches.replace_forward(part(attention, names), partial(self._part, number, name))
        patches.replace_forward(self._entry, self._projector)

    def left(self, layout: Layout, inputs: Inputs, counts: list[int]) -> list[Tensor]:
        """See `TowerHooks`: the visual tokens at which registers stand; those in the padding of tiles are gone."""
        if self._joined is None or self._joined.assignment is None:
            return []
        owner, count = self._joined.assignment, self._joined.kept_indices.shape[1]
        if self.short:
            self.owners = list(owner)
            return list(self._joined.kept_indices)
        if not isinstance(layout, AnyRes):
            raise UserError(f"'{self.reducer.name}' adds registers to the tiles of images; leave videos out")
        number = owner + 1 + count * torch.arange(len(owner), device=owner.device)[:, None]  # 0 is for newlines
        stands = torch.zeros_like(owner).scatter(1, self._joined.kept_indices, 1)
        arranged = layout.arrange(self.model, inputs, torch.stack([number, stands], -1).double())
        if not bool((arranged == arranged.round()).all()):
            raise UserError(
                f"'{self.reducer.name}' adds registers to the vision tower, but this model scales what comes out of it "
                "for so large an image; use a smaller one"
            )
        kept_indices, self.owners = [], []
        for picture in arranged.long().split(counts):
            kept_indices.append(picture[:, 1].nonzero()[:, 0])
            rank = torch.full((int(number.max()) + 1,), -1, device=owner.device)
            rank[picture[kept_indices[-1], 0]] = torch.arange(len(kept_indices[-1]), device=owner.device)
            self.owners.append(rank[picture[:, 0]])
        return kept_indices

    def sizes(self) -> list[Tensor] | None:
        """See `TowerHooks`."""
        if self._joined is None:
            return None
        return [owner[owner >= 0].bincount() for owner in self.owners]

    def _block(self, number: int, plain: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One block: the patches as ever, then the registers."""
        if number == 0:
            self._begin(hidden.shape[1] - self.tower.prefix)
        if self._first < 0 or number < self._first:
            return plain(hidden, *args, **kwargs)
        if number == self._first:
            self._join(hidden)
        with AttentionProbe(self.tower.attention(number), _keys_and_values) as tap:
            out: Tensor = plain(hidden, *args, **kwargs)
        start = now(out)
        self.rows = self._pass(number, plain, tap.rows[0], *args, **kwargs)
        self._elapsed_ms += 1000 * (now(out) - start)
        return self._leave(out) if number == self.tower.feature else out

    def _begin(self, patches: int) -> None:
        """A new pass: where do how many registers join?"""
        keep = self.keep.count(patches)
        stages = self.reducer.stages(self.tower.depth, patches, keep) if keep < patches else {}
        self._first = min(stages, default=-1)
        self.rows, self._joined, self.teacher, self.owners = None, None, None, []

    def _join(self, hidden: Tensor) -> None:
        start, x = now(hidden), hidden[:, self.tower.prefix :]
        side = isqrt(x.shape[1])
        grid = (1, side, side) if side**2 == x.shape[1] else (1, 1, x.shape[1])
        self._joined = call_reducer(self.reducer, VisualTokens(x, grid), self.keep.count(x.shape[1]))
        if self._joined.features is None or self._joined.assignment is None:
            raise ValueError(f"'{self.reducer.name}' is of kind 'register', so it must return features and assignment")
        self.rows = self._joined.features.to(x.dtype)
        self._elapsed_ms += 1000 * (now(hidden) - start)

    def _pass(self, number: int, plain: Any, seen: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The registers through one block, whose attention has the patches' keys and values beside theirs."""
        attention: Any = self.tower.attention(number)
        config, self._at = attention.config, number
        attention.config = View(_unprobed(config), "beside", keys=seen[0], values=seen[1])
        try:
            out: Tensor = plain(self.rows, *args, **kwargs)
        finally:
            attention.config, self._at = config, -1
        return out

    def _leave(self, out: Tensor) -> Tensor:
        """What the projector reads: registers stand before the patches, because signals count from the end."""
        assert self.rows is not None
        return torch.cat([out[:, : self.tower.prefix], self.rows, out[:, self.tower.prefix :]], 1)

    def _part(self, number: int, name: str, plain: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = plain(x, *args, **kwargs)
        return out if self._at != number else self._reducer.adapt(number, name, x, out)

    def _attention(self, number: int, plain: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        if self._at != number:
            return out
        tiles = [1] * len(out[0]) if self.tiles is None else self.tiles
        return (self._reducer.together(number, out[0], tiles), *out[1:])

    def _projector(self, plain: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The tokens, or the patches' with the tokens in their places."""
        if self.rows is None or self._joined is None or self._joined.assignment is None:
            return plain(x, *args, **kwargs)
        count = self.rows.shape[1]
        rows, patches = x.split([count, x.shape[1] - count], 1)
        self.teacher = plain(patches, *args, **kwargs)
        start = now(x)
        pooled, _ = merge_mean(self.teacher, self._joined.assignment, count)
        out: Tensor = self._reducer.leave(rows, plain(rows, *args, **kwargs), pooled).to(pooled.dtype)
        self._elapsed_ms += 1000 * (now(x) - start)
        return out if self.short else self.teacher.scatter(1, self._joined.kept_indices[..., None].expand_as(out), out)

    @property
    def _reducer(self) -> Any:
        return self.reducer


def _keys_and_values(seen: AttentionCall) -> tuple[Tensor, Tensor]:
    return seen.k, seen.v


def _unprobed(config: Any) -> Any:
    """The config itself: taps are there to see what patches do."""
    while "_base" in vars(config):
        config = config._base
    return config


def _beside(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    view: Any = module.config
    module.config = view._base
    try:
        key, value = torch.cat([view.keys, key], 2), torch.cat([view.values, value], 2)
        return attend(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.config = view


AttentionInterface.register("lit_reduce_beside", _beside)
AttentionInterface.register("lit_reduce_flash_beside", _beside)
