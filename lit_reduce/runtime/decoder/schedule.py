"""At which layers the images of a prompt lose how many tokens inside the language model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.decoder.attention_rows import from_tower, sources
from lit_reduce.runtime.decoder.prompt import Prompt
from lit_reduce.runtime.encode import Encoded
from lit_reduce.runtime.prompt_map import PromptMap
from lit_reduce.tokens import Budget


def stages_of(reducer: Reducer, depth: int, tokens: int, keep: int) -> dict[int, int]:
    """`Reducer.stages`, checked.

    Raises:
        UserError: layers that the decoder lacks, no layer at all, counts that rise, or a signal that no layer before
            the first stage has.
    """
    stages = dict(sorted(reducer.stages(depth, tokens, keep).items()))
    if not stages or min(stages) < 0 or max(stages) >= depth:
        where = ", ".join(map(str, stages)) or "none"
        raise UserError(f"'{reducer.name}' acts before layers {where}; this decoder has the layers 0 to {depth - 1}")
    counts = list(stages.values())
    rises = reducer.site != "cache" and reducer.kind != "skip" and counts != sorted(counts, reverse=True)
    if rises or min(counts) < 1 or max(counts) > tokens:
        raise UserError(f"'{reducer.name}' cannot keep {counts} of {tokens} tokens at its layers")
    for stage in stages:
        sources(reducer, stage, depth)
    return stages


def schedule_prompt(
    model: Any,
    short: dict[str, Any],
    prompt_map: PromptMap,
    encoded: Encoded,
    sites: Mapping[str, tuple[Reducer, Budget]],
) -> Prompt:
    """The prompt, each of its images with its signals and its counts at every layer.

    Args:
        model: The backbone.
        short: The inputs that `shorten` returned.
        prompt_map: And how they relate to the full prompt.
        encoded: What was encoded.
        sites: The reducer and its budget at the decoder, at the cache, or both.
    """
    prompt, pictures = Prompt.of(model, short, prompt_map.kept, prompt_map.grids), []
    depth = len(model.get_decoder().layers)
    # A shared pass of the tower holds what others asked for, too, and not all of that has a row for each token.
    asked = frozenset[str]().union(*(from_tower(reducer) for reducer, _ in sites.values()))
    for picture, kept_indices in zip(prompt.pictures, prompt_map.kept_indices, strict=True):
        # Signals have a row for each token that was encoded: fewer than the image's where the tower was reduced.
        first = encoded.kept_indices[picture.number] if encoded.kept_indices else None
        rows = kept_indices if first is None else torch.searchsorted(first, kept_indices)
        given = {name: encoded.signals[name][picture.number][rows] for name in asked}
        stages = {
            site: stages_of(reducer, depth, picture.count, keep.count(picture.count))
            for site, (reducer, keep) in sites.items()
        }
        left, cached = stages.get("decoder", {}), stages.get("cache", {})
        keep = sites["decoder"][1].count(picture.count) if left else picture.count
        pictures.append(replace(picture, given=given, stages=left, cached=cached, keep=keep))
    return replace(prompt, pictures=pictures)


def drops_tokens(prompt: Prompt) -> bool:
    """Whether any image loses tokens at any layer."""
    return any(
        count < picture.count
        for picture in prompt.pictures
        for count in (*picture.stages.values(), *picture.cached.values())
    )
