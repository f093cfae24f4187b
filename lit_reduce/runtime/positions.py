"""Position ids of prompts, as ``generate`` would make them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.runtime.encode import MEDIA, placeholders

MODES = ("keep", "renumber")


def check_positions(mode: str) -> None:
    """Refuse a value of the option ``positions`` that is not one of `MODES`.

    Raises:
        UserError: it is not.
    """
    if mode not in MODES:
        raise UserError(f"positions='{mode}' is not known; use 'keep' or 'renumber'")


def prompt_positions(mask: Tensor) -> Tensor:
    """Position ids ``[B, L]`` that ``generate`` would use for a prompt with this mask."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def positions_of(model: Any, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    """Position ids of the whole prompt; those of Qwen have several rows: frames, rows and columns of images."""
    if not hasattr(model.base_model, "rope_deltas"):
        return prompt_positions(mask)
    positions: Tensor = model._prepare_position_ids_for_generation(
        inputs["input_ids"], {**inputs, "attention_mask": mask}
    )
    return positions


def positions_behind(model: Any, counted: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Position ids ``[4, B, F]`` of tokens behind a cache, new images among them.

    Args:
        model: Of a family with rows of positions for frames, rows and columns.
        counted: ``[4, B, F]``, positions as if all of them were text.
        inputs: Their ids, mask and images.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    kinds = sum(placeholders(model, ids, kind).long() * number for number, kind in enumerate(MEDIA, 1))
    sizes = {name: x for name, x in inputs.items() if name.endswith(("_grid_thw", "_grid_ts"))}
    from_zero, _ = model.base_model.get_rope_index(ids, mm_token_type_ids=kinds, attention_mask=mask, **sizes)
    first = counted.masked_fill(mask == 0, torch.iinfo(counted.dtype).max).amin(-1, keepdim=True)
    return torch.cat([counted[:1], (first[1:] + from_zero).masked_fill(mask == 0, 0)])
