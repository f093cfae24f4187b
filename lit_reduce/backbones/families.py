"""The few facts that differ between families of vision-language models; the rest is uniform in transformers 5."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_reduce.errors import UserError

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Family:
    """What the runtime must be told about a family.

    Attributes:
        name: ``model_type`` of the model's config.
        cls_attention: The attention module of the tower whose first query is the CLS token, at the layer that feeds
            the projector. Raises `UserError` for a tower without CLS.
        projector: The module that maps tower features to the language model's width.
        grids: Frames, rows and columns of each image, from the model and its inputs.
        tokens: Visual tokens of one image at the processor's size.
    """

    name: str
    cls_attention: Callable[[nn.Module], nn.Module]
    projector: Callable[[nn.Module], nn.Module]
    grids: Callable[[nn.Module, Mapping[str, Any]], list[Grid]]
    tokens: Callable[[Any], int]


def _llava_cls_attention(model: Any) -> nn.Module:
    tower = model.base_model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    if not hasattr(getattr(tower, "embeddings", None), "class_embedding"):
        raise UserError(
            f"the vision tower {type(tower).__name__} has no CLS token, so nothing can rank by its attention; "
            "use a reducer that does not need the signal 'cls'"
        )
    layer = model.config.vision_feature_layer
    layer = layer if isinstance(layer, int) else layer[-1]
    # hidden_states[0] is the embedding, so a positive index names the block before it.
    block: nn.Module = tower.encoder.layers[layer if layer < 0 else layer - 1].self_attn
    return block


def _llava_projector(model: Any) -> nn.Module:
    projector: nn.Module = model.base_model.multi_modal_projector
    return projector


def _llava_grids(model: Any, inputs: Mapping[str, Any]) -> list[Grid]:
    patch = model.config.vision_config.patch_size
    if inputs.get("image_sizes") is not None:  # Pixtral towers take images of any size
        return [(1, int(h) // patch, int(w) // patch) for h, w in inputs["image_sizes"]]
    count, _, height, width = inputs["pixel_values"].shape
    return [(1, height // patch, width // patch)] * count


def _llava_tokens(config: Any) -> int:
    vision = config.vision_config
    extra = 1 if config.vision_feature_select_strategy == "full" else 0
    return int((vision.image_size // vision.patch_size) ** 2) + extra


FAMILIES: dict[str, Family] = {
    "llava": Family("llava", _llava_cls_attention, _llava_projector, _llava_grids, _llava_tokens),
}


def family_of(config: Any) -> Family:
    """The family of a model, by the ``model_type`` of its config.

    Raises:
        UserError: the table has no such family.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UserError(
            f"the model family '{kind}' is not supported; known: {', '.join(sorted(FAMILIES))} "
            "(a new one is one entry in lit_reduce/backbones/families.py)"
        )
    return FAMILIES[kind]
