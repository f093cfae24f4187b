"""Runs a reducer inside vision towers that pack all images into one row: Qwen's, and Pixtral.

What stays or goes here is the group of patches that will become one visual token, because mergers need groups whole.
The merger gets the full row back: a patch that was dropped comes with the state in which it left, so the tower alone
saves time. Merging is refused: what another group became is not what stood at this place.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_reduce.backbones.layouts import AnySize, Picture, Units
from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.call import call_reducer, now
from lit_reduce.runtime.patches import Patches
from lit_reduce.runtime.vision.base import TowerHooks, as_token
from lit_reduce.tokens import Budget, VisualTokens

ENDS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_seqlen", "max_length_q", "max_length_k")


class Row:
    """One pass of P patches through the tower, M of which are left.

    Attributes:
        pictures: The images.
        stages: For each image, how many of its groups stay, by block.
        left: For each image, which of its groups are left, ascending.
        places: ``[M]``, where in the full row the patches that are left stand.
    """

    def __init__(self, pictures: list[Picture], stages: list[dict[int, int]], members: Tensor, x: Tensor) -> None:
        self.pictures, self.stages = pictures, stages
        self._members = members.split([picture.count for picture in pictures])
        self._bank = x
        self.left = [torch.arange(picture.count, device=x.device) for picture in pictures]
        self.places = torch.arange(len(x), device=x.device)

    @property
    def short(self) -> bool:
        """Whether any patch is gone."""
        return len(self.places) < len(self._bank)

    def due(self, block: int) -> dict[int, int]:
        """Images that lose groups at a block, and how many of these stay."""
        counts = [stages.get(block, len(left)) for stages, left in zip(self.stages, self.left, strict=True)]
        return {i: count for i, count in enumerate(counts) if count < len(self.left[i])}

    def groups(self, image: int, x: Tensor) -> Tensor:
        """``[1, n, C]``, means over the n groups left of an image from ``x`` ``[M, C]``."""
        rank = torch.zeros(len(self._bank), dtype=torch.long, device=x.device)
        rank[self.places] = torch.arange(len(self.places), device=x.device)
        return x[rank[self._members[image][self.left[image]]]].mean(1)[None]

    def keep(self, chosen: dict[int, Tensor], x: Tensor) -> Tensor:
        """What is left of ``x`` ``[M, C]`` when only the chosen groups of some images stay."""
        self._bank = self.full(x)
        for image, groups in chosen.items():
            self.left[image] = self.left[image][groups]
        rows = [members[left].flatten() for members, left in zip(self._members, self.left, strict=True)]
        self.places = torch.cat(rows).sort().values
        return self._bank[self.places]

    def full(self, x: Tensor) -> Tensor:
        """All patches ``[P, C]``."""
        return self._bank.index_copy(0, self.places, x)

    def fit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a block for the patches that are left: rotations, borders between images, mask."""
        kept = torch.zeros(len(self._bank), dtype=torch.long, device=self.places.device).index_fill(0, self.places, 1)
        before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
        fitted = dict(kwargs)
        fitted["position_embeddings"] = tuple(t[..., self.places, :] for t in kwargs["position_embeddings"])
        for ends, longest in zip(ENDS, LONGEST, strict=True):
            if kwargs.get(ends) is not None:  # of windows that are empty now, nothing remains
                fitted[ends] = before[kwargs[ends].long()].unique_consecutive().to(kwargs[ends].dtype)
                if kwargs.get(longest) is not None:
                    most = fitted[ends].diff().max()
                    fitted[longest] = most if isinstance(kwargs[longest], Tensor) else int(most)
        masks = tuple(None if m is None else m[..., self.places[:, None], self.places] for m in args)
        if kwargs.get("attention_mask") is not None:
            fitted["attention_mask"] = kwargs["attention_mask"][..., self.places[:, None], self.places]
        return masks, fitted


class PackedTowerHooks(TowerHooks):
    """Runs a reducer inside a tower that packs its images.

    Attributes:
        row: The pass that is under way; None when it keeps all, or is over.
    """

    def __init__(self, model: Any, layout: AnySize | Units, reducer: Reducer, keep: Budget) -> None:
        super().__init__(model, reducer, keep)
        self.layout = layout
        self.row: Row | None = None
        self._sizes = torch.empty(0)

    def _patch(self, patches: Patches) -> None:
        super()._patch(patches)
        model = self.model
        patches.replace_forward(model.get_encoder("image"), self._enter)
        for number, block in enumerate(self.tower.blocks):
            patches.replace_forward(block, partial(self._block, number))
        # Qwen3-VL takes features from the middle of the tower, too.
        for merger in getattr(model.get_encoder("image"), "deepstack_merger_list", []):
            patches.replace_forward(merger, self._outlet)

    def _check(self) -> None:
        super()._check()
        if self.reducer.kind != "select":
            raise UserError(
                f"'{self.reducer.name}' merges inside the vision tower, but this one packs images of any size into one "
                "row and its merger needs every patch in its own place; use a reducer that selects, or one at the "
                "projector"
            )

    def _enter(self, plain: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward of the tower as a whole, whose arguments say how large the images are."""
        given = inspect.signature(plain).bind_partial(*args, **kwargs).arguments
        given |= given.get("kwargs", {})
        sizes = given.get("grid_thw", given.get("image_sizes"))
        if sizes is None:
            high, wide = given["pixel_values"].shape[-2:]
            sizes = [(high, wide)] * len(given["pixel_values"])
        self._sizes = torch.as_tensor(sizes, device=next(self.tower.blocks.parameters()).device)
        return plain(*args, **kwargs)

    def _begin(self, x: Tensor) -> Row | None:
        inputs = {self.layout.sizes if isinstance(self.layout, Units) else "image_sizes": self._sizes}
        pictures = self.layout.pictures(self.model, inputs)
        depth = self.tower.depth
        stages = [self.reducer.stages(depth, p.count, self.keep.count(p.count)) for p in pictures]
        members = self.layout.members(self.model, inputs).to(x.device)
        row = Row(pictures, stages, members, x)
        return row if any(row.due(block) for block in range(depth)) else None

    def _block(self, number: int, plain: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One block of the tower, with what the reducer does before it or in its middle."""
        if number == 0:
            self.row, self.reads, self.leaves = self._begin(hidden.flatten(0, -2)), {}, {}
        row = self.row
        if row is None:
            return plain(hidden, *args, **kwargs)
        due = row.due(number)
        if due and self.point == "before":
            hidden = self._reduce(hidden, due, number)
        self._note(self.reads, number)
        reading = self.point == "before" and bool(row.due(number + 1))
        args, fitted = row.fit(args, kwargs)
        if due and self.point == "attention":
            reduce: Callable[[Tensor], Tensor] = partial(self._reduce, due=due, number=number)
            hidden = self._run(number, plain, hidden, reduce, *args, **fitted)
        else:
            with self._reading(number, reading):
                hidden = plain(hidden, *args, **fitted)
        self._note(self.leaves, number)
        if number == self.tower.feature:
            hidden = self._full(hidden)
            self.leaves.pop(number, None)
            self.row = None
        return hidden

    def _note(self, where: dict[int, Tensor], number: int) -> None:
        if self.row is not None and self.row.short:
            where[number] = self.row.places

    def _full(self, hidden: Tensor) -> Tensor:
        assert self.row is not None
        full = self.row.full(hidden.flatten(0, -2))
        return full if hidden.ndim == 2 else full[None]

    def _outlet(self, plain: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(hidden if self.row is None else self._full(hidden), *args, **kwargs)

    def _reduce(self, hidden: Tensor, due: dict[int, int], number: int) -> Tensor:
        """Fewer groups of the images that are due."""
        start, row = now(hidden), self.row
        assert row is not None
        x, chosen = hidden.flatten(0, -2), dict[int, Tensor]()
        for image, count in due.items():
            features, whole = row.groups(image, x), row.pictures[image]
            grid = whole.grid if features.shape[1] == whole.count else (1, 1, features.shape[1])
            given = {text: self._signal(signal.name, image, features) for text, signal in self.signals.items()}
            reduction = call_reducer(self.reducer, VisualTokens(features, grid, given, number), count)
            if reduction.features is not None:
                raise UserError(
                    f"'{self.reducer.name}' makes new tokens, but in this vision tower groups of patches can only stay "
                    "or go; switch that off, or use a reducer at the projector"
                )
            real = slice(None) if reduction.valid is None else reduction.valid[0]
            chosen[image] = reduction.kept_indices[0][real]
        left = row.keep(chosen, x)
        self._elapsed_ms += 1000 * (now(hidden) - start)
        return left if hidden.ndim == 2 else left[None]

    def _signal(self, name: str, image: int, features: Tensor) -> Tensor:
        if name == "size":
            return features.new_ones(features.shape[:2])
        assert self.row is not None
        return as_token(name, self.row.groups(image, self._read(name)[0]))
