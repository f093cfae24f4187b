"""Least-squares initialisation of a recall reducer: its maps are fitted to the frozen decoder's keys and values."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lit_reduce.distill.teacher import Outputs
from lit_reduce.ops.regression import Moments, fit
from lit_reduce.ops.similarity import rms_normalize
from lit_reduce.runtime.attention.probe import AttentionCall, AttentionProbe
from lit_reduce.runtime.decoder.run import embed
from lit_reduce.runtime.encode import placeholders
from lit_reduce.runtime.recall.rotary import unrotated

PICTURES = 64  # pictures for the regression: ten thousand tokens or more


@torch.no_grad()
def keys_and_values(model: Any, prefix: Tensor, features: Tensor, layers: Sequence[int]) -> Tensor:
    """Keys, before any rotary embedding, and values of a picture's tokens in some decoder layers.

    Args:
        model: The frozen backbone.
        prefix: ``[P]``, ids up to the end of the picture; later tokens have no effect in a causal decoder.
        features: ``[N, D]`` its projected tokens.
        layers: Which.

    Returns:
        ``[N, 2 * len(layers), C]``: keys and values of the first layer, then of the second; C over all groups of heads.
    """
    decoder, image = model.get_decoder(), placeholders(model, prefix)
    embeds = embed(model, prefix[None].long(), [features])
    places = torch.arange(len(prefix), device=prefix.device)[None]
    cos, sin = decoder.rotary_emb(embeds, places)

    def read(call: AttentionCall) -> tuple[Tensor, Tensor]:
        return call.k[:, :, image], call.v[:, :, image]

    with ExitStack() as stack:
        taps = [stack.enter_context(AttentionProbe(decoder.layers[layer].self_attn, read)) for layer in layers]
        decoder(inputs_embeds=embeds, position_ids=places, use_cache=False)
    found = []
    for layer, tap in zip(layers, taps, strict=True):
        keys, values = tap.rows[0]
        keys = unrotated(decoder.layers[layer].self_attn, keys, cos[:, image], sin[:, image])
        found += [x[0].transpose(0, 1).flatten(1) for x in (keys, values)]
    return torch.stack(found, 1)


def moments(model: Any, pictures: Iterable[Outputs], layers: Sequence[int]) -> Moments:
    """Sums over the tokens of some pictures, of normalized features and of keys and values in some layers."""
    total: Moments | None = None
    for outputs in pictures:
        features = outputs["features"].to(model.device, model.dtype)
        targets = keys_and_values(model, outputs["prefix"].to(model.device), features, layers)
        new = Moments.of(rms_normalize(features.float()).cpu(), targets.flatten(1).cpu())
        total = new if total is None else total + new
    if total is None:
        raise ValueError("no pictures to regress on")
    return total


def teach_keys(model: Any, reducer: Any, pictures: Iterable[Outputs]) -> None:
    """Fit the maps of a reducer with ``warmup_target = "keys"`` in closed form.

    A layer's keys, and its values, weigh the same whatever their size; the rank is that of the reducer's trunk.
    """
    layers = list(reducer.recalls(len(model.get_decoder().layers)))
    seen = moments(model, pictures, layers)
    width = len(seen.y) // (2 * len(layers))
    spread = seen.spread.view(-1, width).mean(1).clamp_min(1e-12)
    reducer.learn(fit(seen, reducer.config.rank, weight=(1 / spread).repeat_interleave(width)))
