"""Reduces the images of a prompt and shortens the prompt to fit; the model never learns that tokens are missing.

The shortened prompt carries the original position ids, an explicit mask and left padding, so that every cache,
attention kernel and decoding mode of transformers works on it unchanged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_reduce.backbones.families import Grid
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.call import call_reducer, now
from lit_reduce.runtime.encode import IGNORE, MEDIA, Encoded, encoder_keys, placeholders
from lit_reduce.runtime.gather import gather_filled, gather_positions, left_padded
from lit_reduce.runtime.positions import check_positions, positions_of, prompt_positions
from lit_reduce.runtime.prompt_map import Memory, PromptMap
from lit_reduce.runtime.visual import VisualOutput
from lit_reduce.tokens import Budget

Keep = int | float | str | Budget
ALONGSIDE = {"token_type_ids": 0, "mm_token_type_ids": 0, "labels": IGNORE}  # one entry a token, and what padding gets


@dataclass(frozen=True)
class ReducedImages:
    """The images of a batch after a reducer, one entry for each encoded image.

    Attributes:
        features: ``[k_i, D]`` new tokens.
        kept_indices: ``[k_i]`` ascending, which of the encoded tokens they stand for.
        memories: See `PromptMap.memories`.
        elapsed_ms: Time that the reducer took, in milliseconds.
    """

    features: list[Tensor]
    kept_indices: list[Tensor]
    memories: dict[int, Memory] = field(default_factory=dict)
    elapsed_ms: float = 0.0

    def each(self, pictures: Sequence[int]) -> "ReducedImages":
        """Some of the images, each as often as it is named; without memories."""
        return ReducedImages([self.features[i] for i in pictures], [self.kept_indices[i] for i in pictures])


def unreduced(encoded: Encoded) -> ReducedImages:
    """All tokens of all encoded images."""
    features = list(encoded.features)
    return ReducedImages(features, [torch.arange(len(x), device=x.device) for x in features])


def selected_images(encoded: Encoded, kept_indices: Sequence[Tensor]) -> ReducedImages:
    """The encoded images with given tokens kept, one ``[k_i]`` of ascending indices for each."""
    features = [x[index] for x, index in zip(encoded.features, kept_indices, strict=True)]
    return ReducedImages(features, list(kept_indices))


def reduce_images(encoded: Encoded, reducer: Reducer, keep: Keep) -> ReducedImages:
    """Call a reducer on each group of encoded images of equal token count and grid.

    Args:
        encoded: The result of `encode`; it is not changed and serves any number of calls.
        reducer: With all of its signals among those of ``encoded``.
        keep: Budget of each image. Keeping all is the identity for every reducer, to the bit and at no cost.

    Raises:
        UserError: the budget exceeds an image's tokens, or a signal is missing.
    """
    start = now(encoded.features[0]) if encoded.features else 0.0
    budget, groups, memories = Budget.parse(keep), dict[tuple[int, Grid], list[int]](), dict[int, Memory]()
    for i, (x, grid) in enumerate(zip(encoded.features, encoded.grids, strict=True)):
        groups.setdefault((len(x), grid), []).append(i)
    whole = unreduced(encoded)
    features, kept_indices = whole.features, whole.kept_indices
    for (count, _), images in groups.items():
        k = budget.count(count)
        if k == count:
            continue
        tokens = encoded.tokens(images, reducer.signals)
        reduction = call_reducer(reducer, tokens, k)
        new = reduction.gather(tokens) if reduction.features is None else reduction.features.to(tokens.features.dtype)
        for row, i in enumerate(images):
            real = slice(None) if reduction.valid is None else reduction.valid[row]
            features[i], kept_indices[i] = new[row][real], reduction.kept_indices[row][real]
            if reduction.memory is not None and reduction.assignment is not None:
                memories[i] = reduction.memory[row], reduction.assignment[row]
    elapsed = 1000 * (now(features[0]) - start) if features else 0.0
    return ReducedImages(features, kept_indices, memories, elapsed)


def shorten(
    model: Any, inputs: Mapping[str, Any], encoded: Encoded, images: ReducedImages, positions: str = "keep"
) -> tuple[dict[str, Any], PromptMap]:
    """Shorten a prompt to the tokens that reducers left of its images.

    Args:
        model: The backbone.
        inputs: Its inputs for the full prompt.
        encoded: The result of `encode` for these inputs; it is not changed.
        images: What was made of its images.
        positions: ``keep`` gives every token its original position id, ``renumber`` counts anew without gaps.

    Returns:
        Inputs for ``model.generate`` or ``model.forward``, and how they relate to the full prompt.

    Raises:
        UserError: ``positions`` is not a known word.
    """
    check_positions(positions)
    ids = inputs["input_ids"]
    start = now(ids)
    rows, mask = images.kept_indices, inputs.get("attention_mask")
    kept_indices = rows
    if encoded.kept_indices:  # the tower has reduced already
        kept_indices = [first[row] for first, row in zip(encoded.kept_indices, rows, strict=True)]
    mask = torch.ones_like(ids) if mask is None else mask
    position_ids = inputs.get("position_ids")
    position_ids = positions_of(model, inputs, mask) if position_ids is None else position_ids

    selected, vision_inputs = mask.bool(), encoder_keys(model)
    short = {key: value for key, value in inputs.items() if key not in vision_inputs}
    for kind in MEDIA:
        if mine := encoded.of(kind):
            stays = [_marked(kept_indices[i], encoded.counts[i]) for i in mine]
            selected = selected.masked_scatter(placeholders(model, ids, kind), torch.cat(stays))
            levels = [[level[i][rows[i]] for i in mine] for level in encoded.deepstack]
            outputs = VisualOutput.of([images.features[i] for i in mine], levels)
            short.setdefault("mm_encoder_outputs", {})[kind] = outputs
    before, after = encoded.counts, [len(x) for x in images.features]
    if before == after:
        order, valid = torch.arange(ids.shape[1], device=ids.device).expand_as(ids), selected
        short |= {"attention_mask": mask, "position_ids": position_ids}
    else:
        order, valid, _ = left_padded(selected)
        short |= {"input_ids": gather_filled(ids, order, valid, _pad(model)), "attention_mask": valid.long()}
        short["position_ids"] = gather_positions(position_ids, order)
        for name, fill in ALONGSIDE.items():
            if inputs.get(name) is not None:
                short[name] = gather_filled(inputs[name], order, valid, fill)
    if positions == "renumber":
        short["position_ids"] = prompt_positions(valid)
    if getattr(model.base_model, "rope_deltas", None) is not None:  # positions of a later turn: cached tokens + deltas
        model.base_model.rope_deltas = model.base_model.rope_deltas + (mask.sum(1) - valid.sum(1))[:, None]
    elapsed = 1000 * (now(ids) - start) + encoded.elapsed_ms + images.elapsed_ms
    return short, PromptMap(
        selected,
        order,
        valid,
        position_ids,
        kept_indices,
        encoded.grids,
        before,
        after,
        elapsed,
        memories=images.memories,
    )


def _marked(index: Tensor, count: int) -> Tensor:
    """``[count]`` bool, true at ``index``."""
    return torch.zeros(count, dtype=torch.bool, device=index.device).index_fill(0, index, True)


def _pad(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "pad_token_id", None) or 0)
