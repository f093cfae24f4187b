"""What the language model is about to read when reducers act inside it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lit_reduce.reducer import Reducer
from lit_reduce.runtime.compact import PromptMap
from lit_reduce.runtime.decoder.attention_rows import from_tower
from lit_reduce.runtime.decoder.hooks import stages_of
from lit_reduce.runtime.decoder.prefill_state import Prompt
from lit_reduce.runtime.encode import Encoded
from lit_reduce.tokens import Budget


def schedule_prompt(
    model: Any, short: dict[str, Any], logical: PromptMap, encoded: Encoded, sites: Mapping[str, tuple[Reducer, Budget]]
) -> Prompt:
    """The prompt, each of its pictures with its signals and its counts at every layer.

    Args:
        model: The backbone.
        short: The inputs that `compact` returned.
        logical: And how they relate to the full prompt.
        encoded: What was encoded.
        sites: The reducer and its budget at the decoder, at the cache, or both.
    """
    prompt, pictures = Prompt.of(model, short, logical.kept, logical.grids), []
    depth = len(model.get_decoder().layers)
    # A shared pass of the tower holds what others asked for, too, and not all of that has a row for each token.
    asked = frozenset[str]().union(*(from_tower(reducer) for reducer, _ in sites.values()))
    for picture, kept_indices in zip(prompt.pictures, logical.kept_indices, strict=True):
        # Signals have a row for each token that was encoded: fewer than the image's where the tower was reduced.
        first = encoded.kept_indices[picture.number] if encoded.kept_indices else None
        rows = kept_indices if first is None else torch.searchsorted(first, kept_indices)
        given = {name: encoded.signals[name][picture.number][rows] for name in asked}
        stages: dict[str, dict[int, int]] = {
            site: stages_of(reducer, depth, picture.count, keep.count(picture.count))
            for site, (reducer, keep) in sites.items()
        }
        left, cached = stages.get("decoder", {}), stages.get("cache", {})
        keep = sites["decoder"][1].count(picture.count) if left else picture.count
        pictures.append(replace(picture, given=given, stages=left, cached=cached, keep=keep))
    return replace(prompt, pictures=pictures)


def acts(prompt: Prompt) -> bool:
    """Whether any picture loses tokens at any layer."""
    return any(
        count < picture.count
        for picture in prompt.pictures
        for count in (*picture.stages.values(), *picture.cached.values())
    )
