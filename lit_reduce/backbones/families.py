"""The few facts that differ between families of vision-language models; the rest is uniform in transformers 5."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_reduce.backbones.layouts import (
    AnyRes,
    AnySize,
    Grid,
    HalvedFrames,
    Inputs,
    Layout,
    Picture,
    Plain,
    Tiles,
    Units,
)
from lit_reduce.errors import UserError

__all__ = ["FAMILIES", "PIXELS", "Family", "Grid", "Picture", "family_of"]

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True)
class Family:
    """What the runtime must be told about a family.

    Attributes:
        name: ``model_type`` of the model's config.
        layouts: How the tower's tokens become visual tokens, for ``image`` and perhaps ``video``.
        entry: The module, by its path in the base model, whose first input is what the tower found.
        tokens: Visual tokens of one image at the processor's size; 0 where that depends on the image.
        tokenwise: Whether the projector takes each token by itself, so that a shorter sequence passes it as well.
        looks_ahead: Whether tokens of an image (or of the whole prompt) see those behind them, so that a prompt must be
            read at once.
    """

    name: str
    layouts: Mapping[str, Layout]
    entry: str = "multi_modal_projector"
    tokens: Callable[[Any], int] = lambda _: 0
    tokenwise: bool = False
    looks_ahead: bool = False

    def kinds(self, inputs: Inputs) -> list[str]:
        """Which of ``image`` and ``video`` these inputs hold.

        Raises:
            UserError: a video, for a family whose videos are not in the table.
        """
        found = [kind for kind, name in PIXELS.items() if inputs.get(name) is not None]
        for kind in found:
            if kind not in self.layouts:
                raise UserError(f"{kind} inputs of the family '{self.name}' are not supported; use images")
        return found

    def pictures(self, model: Any, inputs: Inputs) -> list[Picture]:
        """All images, then all videos."""
        return [p for kind in self.kinds(inputs) for p in self.layout(kind, inputs).pictures(model, inputs)]

    def grids(self, model: Any, inputs: Inputs) -> list[Grid]:
        """Frames, rows and columns of all images, then of all videos."""
        return [picture.grid for picture in self.pictures(model, inputs)]

    def layout(self, kind: str, inputs: Inputs) -> Layout:
        """The layout of one kind. LLaVA with a Pixtral tower is told by the sizes among its inputs."""
        packed = isinstance(self.layouts[kind], Plain) and inputs.get("image_sizes") is not None
        return AnySize() if packed else self.layouts[kind]

    def row(self, model: Any) -> AnySize | Units | None:
        """The layout of a tower that packs all images into one row; None where images or tiles are a batch."""
        layout = self.layouts["image"]
        if isinstance(layout, Plain) and "pixtral" in type(model.get_encoder("image")).__name__.lower():
            layout = AnySize()
        return layout if isinstance(layout, AnySize | Units) else None

    def projector(self, model: Any) -> nn.Module:
        """The module whose first input is what the tower found."""
        module: nn.Module = model.base_model.get_submodule(self.entry)
        return module


def _square(config: Any) -> int:
    vision = config.vision_config
    extra = 1 if getattr(config, "vision_feature_select_strategy", "default") == "full" else 0
    return int((vision.image_size // vision.patch_size) ** 2) + extra


def _qwen(windows: bool = False) -> dict[str, Layout]:
    return {"image": Units("image_grid_thw", windows), "video": Units("video_grid_thw", windows)}


_TABLE = (
    Family("llava", {"image": Plain()}, tokens=_square, tokenwise=True),
    Family("llava_next", {"image": AnyRes()}),
    Family("llava_onevision", {"image": AnyRes(), "video": HalvedFrames()}),
    Family("qwen2_vl", _qwen(), entry="visual.merger"),
    Family("qwen2_5_vl", _qwen(windows=True), entry="visual.merger"),
    Family("qwen3_vl", _qwen(), entry="visual.merger"),
    Family("idefics3", {"image": Tiles("scale_factor", "overview")}, entry="connector"),
    Family("smolvlm", {"image": Tiles("scale_factor", "overview")}, entry="connector"),
    # InternVL's projector gets shuffled features; the norm before it (an identity in most models) gets the tower's.
    Family("internvl", {"image": Tiles("downsample_ratio", "touching")}, entry="vision_tower.layernorm"),
    Family("paligemma", {"image": Plain()}, tokens=_square, tokenwise=True, looks_ahead=True),
    Family(
        "gemma3", {"image": Tiles("mm_tokens_per_image")}, tokens=lambda c: int(c.mm_tokens_per_image), looks_ahead=True
    ),
    Family("mistral3", {"image": AnySize(merge=2)}),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _TABLE}


def family_of(config: Any) -> Family:
    """The family of a model, by the ``model_type`` of its config.

    Raises:
        UserError: the table has no such family.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UserError(
            f"the model family '{kind}' is not supported: lit_reduce/backbones/families.py has no entry that says how "
            f"its vision tower's tokens become visual tokens; known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[kind]
