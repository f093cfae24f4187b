"""Reducing and shortening in one call, as a session with one reducer at the projector does."""

from collections.abc import Mapping
from typing import Any

from lit_reduce.reducer import Reducer
from lit_reduce.runtime import Encoded, PromptMap, reduce_images, shorten


def compact(
    model: Any, inputs: Mapping[str, Any], encoded: Encoded, reducer: Reducer, keep: Any, positions: str = "keep"
) -> tuple[dict[str, Any], PromptMap]:
    """The short prompt, and how it relates to the full one."""
    return shorten(model, inputs, encoded, reduce_images(encoded, reducer, keep), positions)
