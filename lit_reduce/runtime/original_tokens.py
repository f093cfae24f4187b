"""Callbacks of ``generate`` see the tokens that the caller passed, though the model reads a shortened prompt."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lit_reduce.runtime.site import Option


class OriginalTokens:
    """Puts the prompt that the caller passed before what was generated behind its short form.

    Args:
        given: ``[B, L]``, the prompt of the caller.
        length: S, tokens of its short form.
    """

    def __init__(self, given: Tensor, length: int) -> None:
        self.given, self.length = given, length

    def restore(self, ids: Tensor) -> Tensor:
        """``[n B, L + A]`` ids from ``[n B, S + A]``: every sample may have n rows behind one another."""
        given = self.given.to(ids.device).repeat_interleave(len(ids) // len(self.given), 0)
        return torch.cat([given, ids[:, self.length :]], 1)

    def arguments(self, option: Option, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Those arguments of ``generate`` that are called with ids and need not be criteria or processors."""
        found: dict[str, Any] = {}
        if (streamer := kwargs.get("streamer")) is not None:
            found["streamer"] = _Streamer(streamer, self)
        if (allowed := kwargs.get("prefix_allowed_tokens_fn")) is not None:
            several = option("num_beams") or 1  # beams share the number of their sample, returned sequences do not
            times = 1 if several > 1 else option("num_return_sequences") or 1

            def allow(row: int, ids: Tensor) -> Any:
                return allowed(row, torch.cat([self.given[row // times].to(ids.device), ids[self.length :]]))

            found["prefix_allowed_tokens_fn"] = allow
        return found

    @contextmanager
    def counting(self, model: Any) -> Iterator[None]:
        """Within the ``with`` block the caller's criteria and processors get restored ids.

        They are wrapped after ``generate`` has merged them with its own, which it tells apart by their types.
        """
        name = "_merge_criteria_processor_list"
        merge, before = getattr(model, name), {name: vars(model)[name]} if name in vars(model) else {}

        def merged(own: Any, custom: Any) -> Any:
            theirs = {id(one) for one in custom}
            return type(own)(_Restored(one, self) if id(one) in theirs else one for one in merge(own, custom))

        vars(model)[name] = merged
        try:
            yield
        finally:
            del vars(model)[name]
            vars(model).update(before)


class _Restored:
    """A criterion or processor that is called with restored ids; all else is its own."""

    def __init__(self, inner: Any, tokens: OriginalTokens) -> None:
        self._inner, self._tokens = inner, tokens

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self._inner(self._tokens.restore(input_ids), scores)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_inner"], name) if "_inner" in vars(self) else object.__getattribute__(self, name)


class _Streamer:
    """A streamer that is given the whole prompt first."""

    def __init__(self, inner: Any, tokens: OriginalTokens) -> None:
        self._inner, self._tokens, self._started = inner, tokens, False

    def put(self, value: Tensor) -> None:
        """The prompt, then token after token."""
        self._inner.put(value if self._started else self._tokens.restore(value))
        self._started = True

    def end(self) -> None:
        """See `transformers.generation.streamers.BaseStreamer`."""
        self._inner.end()
