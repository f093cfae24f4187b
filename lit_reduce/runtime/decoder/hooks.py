"""Hooks that run reducers inside the language model: between its layers and in its cache.

A hook runs before each decoder layer. transformers goes on counting all tokens; the hooks narrow what a layer computes
on, give it the mask that fits, and tell its cache layer which slots its keys have (see `slot_cache`). While nothing is
dropped they change nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.generic import is_flash_attention_requested

from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.cache_compat import CACHE, cache_in
from lit_reduce.runtime.call import call_reducer, kept_mask, now
from lit_reduce.runtime.decoder.attention_rows import AttentionRows
from lit_reduce.runtime.decoder.prefill_state import PrefillState
from lit_reduce.runtime.decoder.prompt import ImageTokens, Prompt
from lit_reduce.runtime.decoder.run import tracked
from lit_reduce.runtime.decoder.slot_cache import PAD, Entries, StaticSlotLayer, slotted, use_slots
from lit_reduce.runtime.gather import gather_rows
from lit_reduce.runtime.patches import ModelHooks, Patches
from lit_reduce.tokens import Course, VisualTokens


class DecoderHooks(ModelHooks):
    """The hooks of a decoder for, at most, one reducer between its layers and one at its cache.

    Attributes:
        decoder: Acts between layers: drops, merges, or (kind ``skip``) lets tokens pass by a layer.
        cache: Acts once, at the end of the prompt: from the first decode step on its keys are gone.
        progress: Of training, see `Course`; None at inference.
        counts: Tokens of each image that each layer worked on in the last prompt.
        cached: Visual keys that each layer's cache holds after it, where a reducer acts there.
        pictures: The images with what was left of them at the end, in the last layer.
        elapsed_ms: Milliseconds that reducers took in the last call, the reading of their signals apart.
    """

    def __init__(
        self, model: Any, decoder: Reducer | None = None, cache: Reducer | None = None, progress: float | None = None
    ) -> None:
        super().__init__()
        self.model, self.lm = model, model.get_decoder()
        self.decoder, self.cache, self.progress = decoder, cache, progress
        self.rows = AttentionRows(self.lm)
        self._prompt: Prompt | None = None
        self._state: PrefillState | None = None
        self._store: Cache | None = None
        self._passed: tuple[PrefillState, Tensor, Tensor | None] | None = None
        self._deepstack = getattr(self.lm, "_deepstack_process", None)
        self.clear()

    def _patch(self, patches: Patches) -> None:
        patches.pre_hook(self.lm, self._enter, with_kwargs=True)
        patches.hook(self.lm, self._leave)
        for number, layer in enumerate(self.lm.layers):
            patches.pre_hook(layer, partial(self._before, number), with_kwargs=True)
            if self.decoder is not None and self.decoder.kind == "skip":
                patches.hook(layer, self._rejoin)
        # Models that add visual features between their first layers (Qwen3-VL) do so at all places of the prompt.
        if self._deepstack is not None:
            patches.set(self.lm, "_deepstack_process", self._deepstack_reduced)

    def remove(self) -> None:
        """Take the hooks away; harmless when repeated."""
        super().remove()
        self._rest()

    def clear(self) -> None:
        """Reset what the last call recorded."""
        self.counts: list[list[int]] = []
        self.cached: list[int] = []
        self.pictures: list[ImageTokens] = []
        self.elapsed_ms = 0.0

    @contextmanager
    def reading(self, prompt: Prompt | None) -> Iterator[None]:
        """Within the ``with`` block the next pass through the language model reads this prompt."""
        self.clear()
        self._prompt = prompt
        try:
            yield
        finally:
            self._prompt = None
            self._rest()

    def _rest(self) -> None:
        self._state = self._store = self._passed = None
        self.rows.stop()

    # The pass as a whole ----------------------------------------------------------------------------------------------

    def _enter(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        cache, prompt = cache_in(kwargs), self._prompt
        if prompt is None and not slotted(cache):
            self._state = None
            return None
        embeds = kwargs["inputs_embeds"]
        if prompt is not None:
            if cache is None and self._caches(kwargs.get("use_cache")):
                cache = kwargs[CACHE] = DynamicCache(config=self.lm.config)
            if cache is not None:
                self._prompt = None  # read once; without a cache every step reads it anew
            if embeds.shape[1] < prompt.real.shape[1]:
                raise UserError(
                    f"the prompt arrives in pieces ({embeds.shape[1]} of {prompt.real.shape[1]} tokens); a reducer "
                    "inside the language model needs it whole, so leave out prefill_chunk_size"
                )
            prompt = prompt.repeat(len(embeds) // len(prompt.real))
            self.clear()
        if cache is not None:
            use_slots(cache, len(self.lm.layers))
        past = 0 if cache is None else cache.get_seq_length()
        self._state, self._store = PrefillState(prompt, len(embeds), embeds.shape[1], past, embeds.device), cache
        if prompt is not None:
            self.rows.start(prompt, embeds, self.decoder, self.cache)
        return args, kwargs

    def _caches(self, asked: bool | None) -> bool:
        saving = self.lm.training and getattr(self.lm, "gradient_checkpointing", False)
        return not saving and bool(self.lm.config.use_cache if asked is None else asked)

    def _leave(self, _: Any, __: Any, out: Any) -> Any:
        state, store = self._state, self._store
        if state is None:
            return out
        if state.prompt is not None:
            self.pictures = state.pictures
            if self.cache is not None and store is not None:
                self._evict(store)
            self.rows.stop()
        if state.index is not None:  # dropped tokens become zero, so labels and slices stay where they were
            hidden = out.last_hidden_state
            out.last_hidden_state = state.spread(hidden, hidden.new_zeros(len(hidden), state.length, hidden.shape[2]))
        self._state = self._store = None
        return out

    # One layer --------------------------------------------------------------------------------------------------------

    def _before(self, number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self._state
        if state is None:
            return None
        if state.prompt is not None:
            if number == 0:
                self.rows.ahead(layer, args[0], kwargs, state)
            hidden, state = self._stage(number, state, args[0])
            args, self._state = (hidden, *args[1:]), state
            self.counts.append([picture.count for picture in state.pictures])
        store = None if self._store is None else self._store.layers[number]
        if state.index is not None:
            kwargs["position_embeddings"] = tuple(gather_rows(t, state.index, 1) for t in kwargs["position_embeddings"])
            # Only flash attention reads these, to guess packed samples: gaps would look like packing.
            kwargs["position_ids"] = None
        if state.index is not None or (store is not None and not store.plain):
            keys = state.slots if store is None else store.key_slots(state.slots, state.length)
            padded = state.padded or isinstance(store, StaticSlotLayer) or (store is not None and store.padded)
            flash = is_flash_attention_requested(layer.self_attn.config)
            kwargs["attention_mask"] = state.mask(kwargs.get("attention_mask"), keys, padded, flash)
        if state.prompt is not None:
            kwargs["attention_mask"] = mask = state.gated(kwargs.get("attention_mask"), args[0].dtype)
            args = (tracked(args[0], mask), *args[1:])
            self.rows.aim(number, state, 0 if store is None else store.before())
        if store is not None:
            store.expect(Entries(state.slots, state.length, state.index is None, state.padded))
        return args, kwargs

    def _stage(self, number: int, state: PrefillState, hidden: Tensor) -> tuple[Tensor, PrefillState]:
        """Reduce the images that have fewer tokens from this layer on."""
        due = [p for p in state.pictures if self._due(number, p)]
        if self.decoder is None or not due:
            return hidden, state
        start, skips = now(hidden), self.decoder.kind == "skip"
        here = {p.number: p.at(number) for p in due}
        due = list(here.values())
        state.pictures = [here.get(p.number, p) for p in state.pictures]
        gone: list[tuple[ImageTokens, Tensor]] = []
        stays, weight = hidden.new_ones(hidden.shape[:2]), None
        for group in _groups(due, [p.stages[number] for p in due]):
            rows = torch.tensor([p.row for p in group], device=hidden.device)[:, None]
            columns = torch.stack([p.columns for p in group])
            given = self.rows.read(self.decoder, number, group)
            tokens = VisualTokens(hidden[rows, columns], group[0].grid, given, number, self._course(group))
            reduction = call_reducer(self.decoder, tokens, min(group[0].stages[number], tokens.count - 1))
            ends = columns == state.last[rows]  # the answer begins there, even where that is visual
            stay = kept_mask(reduction, tokens.count) | (ends & (not skips))
            if reduction.features is not None:
                places = columns.gather(1, reduction.kept_indices)
                real = slice(None) if reduction.valid is None else reduction.valid
                new = reduction.features.to(hidden.dtype)[real].reshape(-1, hidden.shape[2])
                where = rows.expand_as(places)[real].reshape(-1), places[real].reshape(-1)
                hidden = hidden.index_put(where, new)
            if skips and reduction.weight is not None:
                weight = torch.ones_like(stays) if weight is None else weight
                weight = weight.index_put((rows.expand_as(columns), columns), reduction.weight.to(hidden.dtype))
                stays = stays.index_put((rows.expand_as(columns), columns), stay.to(hidden.dtype))
            if reduction.gate is not None:
                gates = torch.zeros_like(stay, dtype=reduction.gate.dtype).scatter(
                    1, reduction.kept_indices, reduction.gate
                )
                gates = gates.masked_fill(ends, 1)
                group = [p.gated(gate) for p, gate in zip(group, gates, strict=True)]
                here |= {p.number: p for p in group}
            gone += zip(group, stay, strict=True)
        if skips:
            passing, update = (hidden, None) if weight is None else _weighted(hidden, stays > 0, weight)
            self._passed, state = (state, passing, update), state.copy()
        state.pictures = [here.get(p.number, p) for p in state.pictures]
        hidden = state.narrow(hidden, gone)
        self.elapsed_ms += 1000 * (now(hidden) - start)
        return hidden, state

    def _due(self, number: int, picture: ImageTokens) -> bool:
        """Whether an image loses tokens before this layer."""
        if self.decoder is None or number not in picture.stages:
            return False
        asked = self.decoder.adaptive_count and picture.keep < picture.entered and picture.count > 1
        return asked or picture.stages[number] < picture.count

    def _course(self, group: list[ImageTokens]) -> Course:
        spent = torch.stack([torch.as_tensor(p.spent, device=p.columns.device, dtype=torch.float32) for p in group])
        return Course(len(self.lm.layers), group[0].entered, group[0].keep, spent, self.progress)

    def _rejoin(self, _: Any, __: Any, out: Tensor) -> Tensor:
        """Put the tokens back that skipped a layer."""
        if self._passed is None or self._state is None:
            return out
        (before, hidden, update), state = self._passed, self._state
        self._state, self._passed = before, None
        out = state.spread(out, hidden, before)
        return out if update is None else torch.lerp(hidden, out, update)  # a weight of 1 changes not a bit

    # The cache --------------------------------------------------------------------------------------------------------

    def _evict(self, store: Cache) -> None:
        if self.cache is None:
            return
        for number, layer in enumerate(store.layers):
            left = self.rows.pictures[number]
            due = [p for p in left if p.cached.get(number, p.count) < p.count]
            if due:
                start = now(layer.keys)
                keep = layer.slots != PAD
                less: dict[int, ImageTokens] = {}
                for group in _groups(due, [p.cached[number] for p in due]):
                    samples = torch.tensor([p.row for p in group], device=keep.device)[:, None]
                    columns = torch.stack([p.columns for p in group])
                    keys = layer.keys.transpose(1, 2)[samples, columns].flatten(2)
                    tokens = VisualTokens(keys, group[0].grid, self.rows.read(self.cache, number, group), number)
                    reduction = call_reducer(self.cache, tokens, group[0].cached[number])
                    if reduction.features is not None:
                        raise ValueError(f"reducer '{self.cache.name}' must not make new tokens at the cache")
                    stay = kept_mask(reduction, tokens.count)
                    keep[samples, columns] = stay
                    less |= {p.number: p.only(x.nonzero()[:, 0]) for p, x in zip(group, stay, strict=True)}
                layer.evict(keep)
                left = [less.get(p.number, p) for p in left]
                self.elapsed_ms += 1000 * (now(keep) - start)
            self.cached.append(sum(p.count for p in left))
        self.pictures = left

    def _deepstack_reduced(self, hidden: Tensor, visual: Tensor, features: Tensor) -> Tensor:
        state = self._state
        if state is None or state.index is None:
            return self._deepstack(hidden, visual, features)  # type: ignore[no-any-return, misc]
        rank = visual.flatten().cumsum(0).view_as(visual) - 1
        now = visual.gather(1, state.index) & (state.slots != PAD)
        return self._deepstack(hidden, now, features[rank.gather(1, state.index)[now]])  # type: ignore[no-any-return, misc]


def _weighted(hidden: Tensor, stays: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, n, D]`` that skip a layer, and the weight ``[B, n, 1]`` of its update for the others."""
    weight = weight[..., None]
    return torch.where(stays[..., None], hidden, hidden * weight), torch.where(stays[..., None], weight, 1)


def _groups(pictures: list[ImageTokens], budgets: list[int]) -> list[list[ImageTokens]]:
    """Group images of equal count, grid and budget, now and in all: one call of the reducer each."""
    groups: dict[Any, list[ImageTokens]] = {}
    for picture, budget in zip(pictures, budgets, strict=True):
        key = (picture.count, picture.grid, budget, picture.entered, picture.keep)
        groups.setdefault(key, []).append(picture)
    return list(groups.values())
