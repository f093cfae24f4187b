"""Runs a model on given visual features, for training: without tower and cache, with gradients to the features."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lit_reduce.backbones.families import family_of
from lit_reduce.errors import UserError
from lit_reduce.runtime.encode import MEDIA, placeholders
from lit_reduce.runtime.positions import positions_of
from lit_reduce.runtime.visual import VisualOutput

BESIDE = ("token_type_ids", "mm_token_type_ids")


def run_decoder(
    model: Any,
    inputs: Mapping[str, Any],
    features: Sequence[Tensor] | Tensor | None = None,
    key_bias: Sequence[Tensor] | Tensor | None = None,
    at: Tensor | None = None,
    deepstack: Sequence[Sequence[Tensor]] = (),
) -> Tensor:
    """Logits of a prompt whose visual features are given; gradients state to ``features`` and ``key_bias``.

    The model's own code puts features, positions and masks together, so every family reads what it always reads.

    Args:
        model: The frozen backbone.
        inputs: ``input_ids`` and ``attention_mask`` ``[B, L]``, and ``position_ids`` where they have gaps: either the
            full prompt with all that the processor made for it, or what `shorten` returned.
        features: One ``[n_i, D]`` for each image, then for each video; by default those that `shorten` put into
            ``inputs``.
        key_bias: One ``[n_i]`` for each image, added to the attention logits of that key in every layer and head:
            0 shows a token, the dtype's lowest value hides it (the training gate).
        at: ``[B, L]`` bool, the positions whose logits are wanted; all by default.
        deepstack: With ``features``, for each level of a model that adds visual features to deeper layers (Qwen3-VL),
            one ``[n_i, D]`` for each image: `Encoded.deepstack`.

    Returns:
        Logits ``[B, L, V]``, or ``[P, V]`` for the P positions of ``at`` in row order.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask  # never None: gaps in positions would read as packed samples
    position_ids = inputs.get("position_ids")
    given = {name: inputs[name] for name in BESIDE if inputs.get(name) is not None}
    visual = inputs.get("mm_encoder_outputs") if features is None else _visual(model, ids, features, deepstack)
    if visual:
        given["mm_encoder_outputs"] = visual
    with _bias(model, ids, key_bias):
        hidden = model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions_of(model, inputs, mask) if position_ids is None else position_ids,
            use_cache=False,
            **given,
        ).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden if at is None else hidden[at])
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def embed(model: Any, ids: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Token embeddings ``[B, L, D]`` with ``features`` in the place of the image tokens, for `get_decoder` alone.

    Raises:
        UserError: a model whose decoder needs more than embeddings and counted positions.
    """
    if hasattr(model.base_model, "rope_deltas") or family_of(model.config).looks_ahead:
        raise UserError(
            "several questions about one picture in one row, as distillation lays them, do not fit "
            f"'{model.config.model_type}': "
            "it position_ids pictures in several dimensions, or lets their tokens look ahead"
        )
    embeds: Tensor = model.get_input_embeddings()(ids)
    if len(features) == 0:
        return embeds
    flat = torch.cat(list(features)).to(embeds.dtype)
    return embeds.masked_scatter(placeholders(model, ids)[..., None], flat)


def _visual(
    model: Any, ids: Tensor, features: Sequence[Tensor] | Tensor, deepstack: Sequence[Sequence[Tensor]]
) -> dict[str, VisualOutput]:
    """The features as the model's own tower would have given them, images first."""
    rows, found = list(features), dict[str, VisualOutput]()
    start, counts = 0, [len(x) for x in rows]
    for kind in MEDIA:
        wanted, end = int(placeholders(model, ids, kind).sum()), start
        while end < len(rows) and sum(counts[start:end]) < wanted:
            end += 1
        if end > start:
            levels = [list(level[start:end]) for level in deepstack]
            found[kind] = VisualOutput.of(rows[start:end], levels)
        start = end
    return found


def tracked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The hidden states of a layer, requiring a gradient where its mask does: in the first layer nothing else would.

    The fused kernel on GPUs keeps what the gradient of a mask needs only where queries, keys or values have one too.
    """
    if mask is None or not mask.requires_grad or hidden.requires_grad:
        return hidden
    return hidden.detach().requires_grad_()


@contextmanager
def _bias(model: Any, ids: Tensor, key_bias: Sequence[Tensor] | Tensor | None) -> Iterator[None]:
    """Within the ``with`` block every layer adds a bias to the columns of visual tokens, on top of its own mask."""
    if key_bias is None:
        yield
        return
    bias = torch.cat(list(key_bias))
    columns = torch.zeros(ids.shape, dtype=bias.dtype, device=ids.device)
    columns = columns.masked_scatter(placeholders(model, ids), bias)[:, None, None]

    def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        mask, low = kwargs.get("attention_mask"), torch.finfo(args[0].dtype).min
        if mask is None:  # causal, without padding
            mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        elif mask.ndim == 2:
            raise UserError("the training gate needs masks that can be added to; load the backbone with sdpa or eager")
        shown = columns.to(args[0].dtype)
        mask = torch.where(mask, shown, low) if mask.dtype == torch.bool else (mask + shown).clamp(min=low)
        return (tracked(args[0], mask), *args[1:]), kwargs | {"attention_mask": mask}

    handles = [x.register_forward_pre_hook(add, with_kwargs=True) for x in model.get_decoder().layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
