"""Shortens a prompt: the reducer's tokens take the place of the image; the model never learns that any are missing.

The shortened prompt carries the original position ids, an explicit mask and left padding, so that every cache,
attention kernel and decoding mode of transformers works on it unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_reduce.backbones.families import Grid
from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.call import call, kept, now
from lit_reduce.runtime.encode import IGNORE, KINDS, Encoded, encoder_keys, placeholders
from lit_reduce.runtime.visual import Visual
from lit_reduce.tokens import Budget

Keep = int | float | str | Budget
Memory = tuple[Tensor, Tensor]
ALONGSIDE = {"token_type_ids": 0, "mm_token_type_ids": 0, "labels": IGNORE}  # one entry a token, and what padding gets


@dataclass(frozen=True)
class PromptMap:
    """How a shortened prompt of length S relates to the original one of length L.

    Attributes:
        selected: ``[B, L]``, true at the tokens that stayed; padding is false.
        order: ``[B, S]``, the original index of each token of the short prompt.
        valid: ``[B, S]``, the mask of the short prompt.
        positions: ``[B, L]`` position ids of the original prompt, or ``[R, B, L]`` of a model with R rows of them.
        kept_indices: The kept indices of each image, ascending.
        grids: Frames, rows and columns of each image.
        total: Visual tokens of each image before.
        kept: And after.
        layers: See `per_layer`; empty where all layers work on what is kept.
        reducer_ms: Time spent in reducing and shortening, in milliseconds.
        memories: For images that layers of the language model look back at (kind ``recall``): what `Reduction.memory`
            holds ``[N, S]``, and which of the kept tokens each of the N went into, -1 for none.
    """

    selected: Tensor
    order: Tensor
    valid: Tensor
    positions: Tensor
    kept_indices: list[Tensor]
    grids: list[Grid]
    total: list[int]
    kept: list[int]
    reducer_ms: float
    layers: list[float] = field(default_factory=list)
    memories: dict[int, Memory] = field(default_factory=dict)

    @property
    def per_layer(self) -> list[float]:
        """Tokens of each image that a layer of the language model works on, averaged over its layers."""
        return self.layers or [float(count) for count in self.kept]


def compact(
    model: Any,
    inputs: Mapping[str, Any],
    encoded: Encoded,
    reducer: Reducer,
    keep: Keep,
    positions: str = "keep",
) -> tuple[dict[str, Any], PromptMap]:
    """Reduce the encoded images and shorten the prompt to fit.

    Args:
        model: The backbone.
        inputs: Its inputs for the full prompt.
        encoded: The result of `encode` for these inputs; it is not changed and serves any number of calls.
        reducer: Called once for each group of images of equal token count.
        keep: Budget of each image.
        positions: ``keep`` gives every token its original position id, ``renumber`` counts anew without gaps.

    Returns:
        Inputs for ``model.generate`` or ``model.forward``, and how they relate to the full prompt.

    Raises:
        UserError: the budget exceeds an image's tokens, a signal is missing, or ``positions`` is not a known word.
    """
    if positions not in ("keep", "renumber"):
        raise UserError(f"positions='{positions}' is not known; use 'keep' or 'renumber'")
    ids = inputs["input_ids"]
    start = now(ids)
    memories: dict[int, Memory] = {}
    features, stays, rows = reduce_images(encoded, reducer, keep, memories)
    kept_indices = rows
    if encoded.kept_indices:  # the tower has reduced already
        kept_indices = [first[row] for first, row in zip(encoded.kept_indices, rows, strict=True)]
        stays = [
            x.new_zeros(n).bool().index_fill(0, a, True)
            for x, n, a in zip(rows, encoded.counts, kept_indices, strict=True)
        ]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    places = inputs.get("position_ids")
    places = positions_of(model, inputs, mask) if places is None else places

    selected = mask.bool()
    pictures = encoder_keys(model)
    short = {key: value for key, value in inputs.items() if key not in pictures}
    for kind in KINDS:
        if mine := encoded.of(kind):
            chosen = torch.cat([stays[i] for i in mine])
            selected = selected.masked_scatter(placeholders(model, ids, kind), chosen)
            levels = [[level[i][rows[i]] for i in mine] for level in encoded.deepstack]
            short.setdefault("mm_encoder_outputs", {})[kind] = Visual.of([features[i] for i in mine], levels)
    before, after = encoded.counts, [len(x) for x in features]
    if before == after:
        order, valid = torch.arange(ids.shape[1], device=ids.device).expand_as(ids), selected
        short |= {"attention_mask": mask, "position_ids": places}
    else:
        order, valid = _left_padded(selected)
        short |= {"input_ids": _take(ids, order, valid, _pad(model)), "attention_mask": valid.long()}
        short["position_ids"] = places.gather(-1, order.expand(*places.shape[:-1], -1))
        for name, fill in ALONGSIDE.items():
            if inputs.get(name) is not None:
                short[name] = _take(inputs[name], order, valid, fill)
    if positions == "renumber":
        short["position_ids"] = prompt_positions(valid)
    if getattr(model.base_model, "rope_deltas", None) is not None:  # positions of a later turn: cached tokens + deltas
        model.base_model.rope_deltas = model.base_model.rope_deltas + (mask.sum(1) - valid.sum(1))[:, None]
    spent = 1000 * (now(ids) - start) + encoded.spent
    return short, PromptMap(
        selected, order, valid, places, kept_indices, encoded.grids, before, after, spent, memories=memories
    )


def reduce_images(
    encoded: Encoded, reducer: Reducer, keep: Keep, memories: dict[int, Memory] | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Call the reducer on each group of images of equal count and grid; what it remembers goes into ``memories``.

    Returns:
        For each image the new tokens ``[k_i, D]``, which of those encoded stay ``[n_i]``, and the anchors ``[k_i]``.
    """
    budget, groups = Budget.parse(keep), dict[tuple[int, Grid], list[int]]()
    for i, (x, grid) in enumerate(zip(encoded.features, encoded.grids, strict=True)):
        groups.setdefault((len(x), grid), []).append(i)
    features: list[Tensor] = list(encoded.features)
    stays = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in features]
    kept_indices = [torch.arange(len(x), device=x.device) for x in features]
    for (count, _), images in groups.items():
        k = budget.count(count)
        if k == count:  # keeping all is the identity for every reducer, to the bit and at no cost
            continue
        tokens = encoded.tokens(images, reducer.signals)
        reduction = call(reducer, tokens, k)
        new = reduction.gather(tokens) if reduction.features is None else reduction.features.to(tokens.features.dtype)
        valid = reduction.valid
        stay = kept(reduction, count)
        for row, i in enumerate(images):
            real = slice(None) if valid is None else valid[row]
            features[i], stays[i], kept_indices[i] = new[row][real], stay[row], reduction.kept_indices[row][real]
            if memories is not None and reduction.memory is not None and reduction.assignment is not None:
                memories[i] = reduction.memory[row], reduction.assignment[row]
    return features, stays, kept_indices


def prompt_positions(mask: Tensor) -> Tensor:
    """Position ids ``[B, L]`` that ``generate`` would use for a prompt with this mask."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def positions_of(model: Any, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    """Position ids of the whole prompt; those of Qwen have several rows: frames, rows and columns of pictures."""
    if not hasattr(model.base_model, "rope_deltas"):
        return prompt_positions(mask)
    places: Tensor = model._prepare_position_ids_for_generation(inputs["input_ids"], {**inputs, "attention_mask": mask})
    return places


def positions_behind(model: Any, counted: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Positions ``[4, B, F]`` of tokens behind a cache, new pictures among them.

    Args:
        model: Of a family with rows of positions for frames, rows and columns.
        counted: ``[4, B, F]``, positions as if all of them were text.
        inputs: Their ids, mask and pictures.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    kinds = sum(placeholders(model, ids, kind).long() * number for number, kind in enumerate(KINDS, 1))
    sizes = {name: x for name, x in inputs.items() if name.endswith(("_grid_thw", "_grid_ts"))}
    from_zero, _ = model.base_model.get_rope_index(ids, mm_token_type_ids=kinds, attention_mask=mask, **sizes)
    first = counted.masked_fill(mask == 0, torch.iinfo(counted.dtype).max).amin(-1, keepdim=True)
    return torch.cat([counted[:1], (first[1:] + from_zero).masked_fill(mask == 0, 0)])


def _left_padded(selected: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the selected tokens in their order, padded on the left, and which entries are real."""
    length = int(selected.sum(1).max())
    order = torch.argsort(selected.int(), dim=1, stable=True)[:, selected.shape[1] - length :]
    return order, selected.gather(1, order)


def _take(x: Tensor, order: Tensor, valid: Tensor, fill: int) -> Tensor:
    return x.gather(1, order).masked_fill(~valid, fill)


def _pad(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "pad_token_id", None) or 0)
