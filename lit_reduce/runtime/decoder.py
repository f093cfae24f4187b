"""Runs the language model alone on a full or shortened prompt, for training: embeddings in, logits out, no cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_reduce.runtime.compact import prompt_positions
from lit_reduce.runtime.encode import placeholders


def run_decoder(
    model: Any,
    inputs: Mapping[str, Any],
    features: Sequence[Tensor] | Tensor | None = None,
    key_bias: Sequence[Tensor] | Tensor | None = None,
    at: Tensor | None = None,
) -> Tensor:
    """Logits of a prompt whose visual embeddings are given; gradients flow to ``features`` and ``key_bias``.

    Args:
        model: The frozen backbone.
        inputs: ``input_ids`` and ``attention_mask`` ``[B, L]``, and ``position_ids`` where they have gaps: either the
            full prompt, or what `compact` returned.
        features: One ``[n_i, D]`` for each image; by default those that `compact` put into ``inputs``.
        key_bias: One ``[n_i]`` for each image, added to the attention logits of that key in every layer and head:
            0 shows a token, the dtype's lowest value hides it (the training gate).
        at: ``[B, L]`` bool, the positions whose logits are wanted; all by default.

    Returns:
        Logits ``[B, L, V]``, or ``[P, V]`` for the P positions of ``at`` in row order.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask  # never None: gaps in positions would read as packed samples
    positions = inputs.get("position_ids")
    if features is None and inputs.get("mm_encoder_outputs"):
        features = inputs["mm_encoder_outputs"]["image"].pooler_output
    embeds = embed(model, ids, features)
    hidden = model.get_decoder()(
        inputs_embeds=embeds,
        attention_mask=mask if key_bias is None else biased_mask(model, ids, mask, key_bias, embeds.dtype),
        position_ids=prompt_positions(mask) if positions is None else positions,
        use_cache=False,
    ).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden if at is None else hidden[at])
    return logits


def embed(model: Any, ids: Tensor, features: Sequence[Tensor] | Tensor | None) -> Tensor:
    """Token embeddings ``[B, L, D]`` with ``features`` in the place of the image tokens."""
    embeds: Tensor = model.get_input_embeddings()(ids)
    if features is None or len(features) == 0:
        return embeds
    flat = torch.cat(list(features)).to(embeds.dtype)
    return embeds.masked_scatter(placeholders(model, ids)[..., None], flat)


def biased_mask(
    model: Any, ids: Tensor, mask: Tensor, key_bias: Sequence[Tensor] | Tensor, dtype: torch.dtype
) -> Tensor:
    """The causal mask ``[B, 1, L, L]`` with a bias on the columns of image tokens, as attention layers add it."""
    bias = torch.cat(list(key_bias)).to(dtype)
    columns = torch.zeros(ids.shape, dtype=dtype, device=ids.device).masked_scatter(placeholders(model, ids), bias)
    allowed = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    allowed = allowed & mask.bool()[:, None, None]
    return torch.where(allowed, columns[:, None, None], torch.finfo(dtype).min)
