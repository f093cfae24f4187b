"""How the tokens of a vision tower become the visual tokens of a language model, one layout a way of doing it.

A layout answers two questions: which pictures do these inputs hold (`pictures`), and which visual tokens do the rows of
a tensor over the tower's tokens belong to (`arrange`)? Signals are arranged like features, so they stay aligned. Where
several tower tokens make one visual token, it gets their mean; newline tokens, which no tower token makes, get zeros.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int, int]
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """An image or a video: its grid of frames, rows and columns, and its visual tokens (newlines included)."""

    grid: Grid
    count: int


class Layout(Protocol):
    """What a family says about its images or its videos."""

    def pictures(self, model: Any, inputs: Inputs) -> list[Picture]:
        """The pictures in the order of their features; tiles of one image are one picture."""

    def arrange(self, model: Any, inputs: Inputs, x: Tensor) -> Tensor:
        """Rows ``[tokens, C]`` of all pictures from ``[tiles, S, C]`` (or ``[1, all, C]``) of the tower.

        Prefix tokens such as CLS may stand before the patches of a tile; they are cut off.
        """


def _patches(model: Any, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of a tensor ``[..., height, width]``."""
    size = model.config.vision_config.patch_size
    rows, columns = size if isinstance(size, (list, tuple)) else (size, size)
    return pixels.shape[-2] // rows, pixels.shape[-1] // columns


@dataclass(frozen=True)
class Plain:
    """One visual token a patch, in raster order: LLaVA-1.5, PaliGemma."""

    def pictures(self, model: Any, inputs: Inputs) -> list[Picture]:
        """See `Layout`."""
        rows, columns = _patches(model, inputs["pixel_values"])
        extra = int(getattr(model.config, "vision_feature_select_strategy", "default") == "full")  # CLS is kept
        return [Picture((1, rows, columns), rows * columns + extra)] * len(inputs["pixel_values"])

    def arrange(self, model: Any, inputs: Inputs, x: Tensor) -> Tensor:
        """See `Layout`."""
        return x[:, -self.pictures(model, inputs)[0].count :].flatten(0, 1)


@dataclass(frozen=True)
class Kept:
    """What is left of `Plain` where the tower itself was reduced.

    Attributes:
        kept_indices: ``[images, k]``, the patches that are left.
    """

    kept_indices: Tensor

    def pictures(self, _model: Any, _inputs: Inputs) -> list[Picture]:
        """See `Layout`."""
        return [Picture((1, 1, self.kept_indices.shape[1]), self.kept_indices.shape[1])] * len(self.kept_indices)

    def arrange(self, model: Any, inputs: Inputs, x: Tensor) -> Tensor:
        """See `Layout`; rows of a block that still had more patches are those of the ones left."""
        patches = math.prod(_patches(model, inputs["pixel_values"]))
        if x.shape[1] >= patches:
            x = x[:, -patches:].gather(1, self.kept_indices[..., None].expand(-1, -1, x.shape[-1]))
        return x[:, -self.kept_indices.shape[1] :].flatten(0, 1)


@dataclass(frozen=True)
class AnySize:
    """Images of any size behind one another in one row, ``merge`` x ``merge`` patches a token: Pixtral towers."""

    merge: int = 1

    def pictures(self, model: Any, inputs: Inputs) -> list[Picture]:
        """See `Layout`."""
        step = model.config.vision_config.patch_size * self.merge
        grids = [(1, int(h) // step, int(w) // step) for h, w in inputs["image_sizes"]]
        return [Picture(grid, math.prod(grid)) for grid in grids]

    def arrange(self, model: Any, inputs: Inputs, x: Tensor) -> Tensor:
        """See `Layout`."""
        return x.flatten(0, -2)[self.members(model, inputs)].mean(1)

    def members(self, model: Any, inputs: Inputs) -> Tensor:
        """``[N, merge**2]``, the places in the tower's row of the patches that make each visual token."""
        start, found = 0, []
        for _, rows, columns in (picture.grid for picture in self.pictures(model, inputs)):
            place = torch.arange(rows * columns * self.merge**2).reshape(rows, self.merge, columns, self.merge)
            found.append(place.transpose(1, 2).reshape(rows * columns, -1) + start)
            start += place.numel()
        return torch.cat(found).to(inputs["image_sizes"].device)


def _block_means(x: Tensor, rows: int, columns: int, size: int) -> Tensor:
    """Means of ``size`` x ``size`` blocks: ``[T, rows * columns * size**2, C]`` to ``[T * rows * columns, C]``."""
    blocks = x.reshape(len(x), rows, size, columns, size, x.shape[-1])
    return blocks.mean((2, 4)).flatten(0, 2) if size > 1 else x.flatten(0, 1)


@dataclass(frozen=True)
class Tiles:
    """Square tiles, blocks of patches shuffled or pooled into one token: Idefics3, SmolVLM, InternVL, Gemma3.

    Attributes:
        block: Name of the setting that says how patches become tokens.
        together: Which tiles are one picture: ``alone`` (crops of Gemma3's pan and scan too, for its prompts put the
            same words between them as between images), ``touching`` (placeholders without text between them), or
            ``overview`` (up to the tile that is announced by the same token as the last one of the prompt).
    """

    block: str
    together: str = "alone"

    def size(self, model: Any, inputs: Inputs) -> tuple[int, int]:
        """Patches a block's side, and blocks a tile's side."""
        side = _patches(model, inputs["pixel_values"])[0]
        value = getattr(model.config, self.block)
        if self.block == "mm_tokens_per_image":
            value = side // math.isqrt(value)
        block = round(1 / value) if value < 1 else int(value)
        return block, side // block

    def pictures(self, model: Any, inputs: Inputs) -> list[Picture]:
        """See `Layout`."""
        side = self.size(model, inputs)[1]
        if self.together == "alone":
            return [Picture((1, side, side), side**2)] * len(inputs["pixel_values"])
        counts = [n for row in inputs["input_ids"] for n in self._tiles(row, model.config.image_token_id, side**2)]
        return [Picture((n, side, side), n * side**2) for n in counts]

    def _tiles(self, ids: Tensor, token: int, length: int) -> list[int]:
        """Tiles of each picture in one prompt."""
        starts = (ids == token).nonzero()[:, 0][::length]
        if not len(starts):
            return []
        if self.together == "touching":
            last = torch.cat([starts[1:] != starts[:-1] + length, starts.new_ones(1).bool()])
        else:
            before = ids[(starts - 1).clamp(min=0)]
            last = before == before[-1]
        ends: list[int] = (last.nonzero()[:, 0] + 1).tolist()
        return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    def arrange(self, model: Any, inputs: Inputs, x: Tensor) -> Tensor:
        """See `Layout`."""
        block, side = self.size(model, inputs)
        return _block_means(x[:, -((block * side) ** 2) :], side, side, block)


@dataclass(frozen=True)
class Units:
    """Groups of patches that are merged, behind one another in one row: Qwen's towers, for images and videos.

    Attributes:
        sizes: Name of the input with frames, rows and columns of patches.
        windows: Whether the tower puts the groups of a window together.
    """

    sizes: str
    windows: bool = False

    def pictures(self, model: Any, inputs: Inputs) -> list[Picture]:
        """See `Layout`."""
        merge = model.config.vision_config.spatial_merge_size
        grids = [(t, h // merge, w // merge) for t, h, w in inputs[self.sizes].tolist()]
        return [Picture(grid, math.prod(grid)) for grid in grids]

    def arrange(self, model: Any, inputs: Inputs, x: Tensor) -> Tensor:
        """See `Layout`."""
        return x.flatten(0, -2)[self.members(model, inputs)].mean(1)

    def members(self, model: Any, inputs: Inputs) -> Tensor:
        """``[N, merge**2]``, the places in the tower's row of the patches that make each visual token."""
        unit = model.config.vision_config.spatial_merge_size**2
        groups = int(inputs[self.sizes].prod(1).sum()) // unit
        place = torch.arange(groups * unit, device=inputs[self.sizes].device).view(groups, unit)
        return place[self.order(model, inputs).argsort()] if self.windows else place

    def order(self, model: Any, inputs: Inputs) -> Tensor:
        """The group that stands at each place of the tower's row."""
        from transformers.vision_utils import get_vision_window_index

        vision = model.config.vision_config
        order: Tensor = get_vision_window_index(
            inputs[self.sizes], vision.spatial_merge_size, vision.window_size, vision.patch_size
        )[0]
        return order


@dataclass(frozen=True)
class AnyRes:
    """An overview and tiles, joined, cut to the image's shape, each row ended by a newline: LLaVA-NeXT, -OneVision.

    The model's own function puts signals together as it does features.
    """

    def pictures(self, model: Any, inputs: Inputs) -> list[Picture]:
        """See `Layout`; rows and columns are those of the tiles together, or of the overview where it is alone."""
        rows, columns = _patches(model, inputs["pixel_values"])
        tiles = self.tiles(model, inputs)
        newlines = self._together(model, inputs, torch.zeros(sum(tiles), rows * columns, 1), 1.0)
        found = []
        for count, marks in zip(tiles, newlines, strict=True):
            ends = int(marks.sum())
            whole = (1, ends, (len(marks) - rows * columns) // max(ends, 1) - 1) if count > 1 else (1, 0, 0)
            # Nothing of a very thin picture is left after padding is cut: its overview stands alone.
            found.append(Picture(whole if min(whole[1:]) > 0 else (1, rows, columns), len(marks)))
        return found

    def arrange(self, model: Any, inputs: Inputs, x: Tensor) -> Tensor:
        """See `Layout`."""
        rows, columns = _patches(model, inputs["pixel_values"])
        return torch.cat(self._together(model, inputs, x[:, -rows * columns :], 0.0))

    def _together(self, model: Any, inputs: Inputs, x: Tensor, newline: float) -> list[Tensor]:
        base, config = model.base_model, model.config
        parts = x.split(self.tiles(model, inputs))
        if hasattr(config, "vision_aspect_ratio"):
            how = {"vision_aspect_ratio": inputs.get("vision_aspect_ratio") or config.vision_aspect_ratio}
        else:
            how = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
        ends = x.new_full((x.shape[-1],), newline)
        packed: list[Tensor] = base.pack_image_features(parts, inputs["image_sizes"], image_newline=ends, **how)[0]
        return packed

    def tiles(self, model: Any, inputs: Inputs) -> list[int]:
        """Tiles of each image, the overview included; several images in one prompt may have the overview alone."""
        count = sys.modules[type(model.base_model).__module__].image_size_to_num_patches
        config, sizes, many = model.config, inputs["image_sizes"], inputs.get("batch_num_images")
        cut = [True] * len(sizes) if many is None else [n == 1 for n in many for _ in range(int(n))]
        side = config.vision_config.image_size
        return [
            count(image_size=size, grid_pinpoints=config.image_grid_pinpoints, patch_size=side) if yes else 1
            for size, yes in zip(sizes, cut, strict=True)
        ]


@dataclass(frozen=True)
class HalvedFrames:
    """Frames scaled to half their rows and columns, and one newline at the end: videos of LLaVA-OneVision."""

    def pictures(self, model: Any, inputs: Inputs) -> list[Picture]:
        """See `Layout`."""
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        rows, columns = (math.ceil(n / 2) for n in _patches(model, inputs["pixel_values_videos"]))
        return [Picture((frames, rows, columns), frames * rows * columns + 1)] * videos

    def arrange(self, model: Any, inputs: Inputs, x: Tensor) -> Tensor:
        """See `Layout`."""
        videos = len(inputs["pixel_values_videos"])
        halved = model.base_model.apply_pooling(x).reshape(videos, -1, x.shape[-1])
        return F.pad(halved, (0, 0, 0, 1)).flatten(0, 1)
