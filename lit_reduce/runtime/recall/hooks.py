"""Hooks of reducers of kind ``recall``: layers of the language model look back at images that entered it shortened.

The memory that they look back at stands beside the sequence and beside its cache: neither grows, and transformers never
learns of it. Hooks before layers change the hidden states of the short stream; probes on attention modules add to the
output of their kernels for the tokens that query the memory. Both leave the kernels alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.recall import AttentionRecall, RecallReducer, TokenRecall
from lit_reduce.runtime.attention.probe import AttentionCall, AttentionProbe, View
from lit_reduce.runtime.cache_compat import cache_in, cache_of
from lit_reduce.runtime.call import now
from lit_reduce.runtime.gather import gather_rows
from lit_reduce.runtime.patches import ModelHooks, Patches
from lit_reduce.runtime.recall.memory import ImageMemory, MemoryEntry, PaddedMemory
from lit_reduce.runtime.recall.rotary import rotated

_NAME = "_lit_reduce_memory"  # kept on the cache itself, so that it follows copies and dies with it


class RecallHooks(ModelHooks):
    """The hooks of a reducer of kind ``recall``.

    Attributes:
        elapsed_ms: Milliseconds that its looking back took in the last call of the model.
    """

    def __init__(self, model: Any, reducer: RecallReducer) -> None:
        super().__init__()
        self.model, self.lm, self.reducer = model, model.get_decoder(), reducer
        self.layers = frozenset(recall_layers(reducer, len(self.lm.layers)))
        self.elapsed_ms = 0.0
        self._pending: ImageMemory | None = None
        self._fresh = 0
        self._rest()

    def _patch(self, patches: Patches) -> None:
        patches.pre_hook(self.lm, self._enter, with_kwargs=True)
        patches.hook(self.lm, self._leave)
        if self.reducer.reads == "tokens":
            for number in self.layers:
                patches.pre_hook(self.lm.layers[number], partial(self._before, number))
            return
        for number in sorted(self.layers | {number - 1 for number in self.layers}):
            attention = self.lm.layers[number].self_attn
            patches.set(attention, "config", _RecallProbe(self, number, attention).view)

    def remove(self) -> None:
        """Take the hooks away; harmless when repeated."""
        super().remove()
        self._rest()

    @contextmanager
    def reading(self, memory: ImageMemory | None, fresh: int = 0) -> Iterator[None]:
        """Within the ``with`` block the next pass through the language model reads a prompt.

        Args:
            memory: Of its images, or None: those that its cache knows.
            fresh: Then, the tokens that are not in the cache; only the last of them asks.
        """
        self._pending, self._fresh, self.elapsed_ms = memory, fresh, 0.0
        try:
            yield
        finally:
            self._pending, self._fresh = None, 0
            self._rest()

    def _rest(self) -> None:
        self._memory: ImageMemory | None = None
        self._padded: PaddedMemory | None = None
        self._row: Tensor | None = None
        self._start: Tensor | None = None
        self._new: list[MemoryEntry] = []
        self._past = 0

    def _enter(self, _: Any, __: Any, kwargs: dict[str, Any]) -> None:
        cache, embeds, fresh = cache_in(kwargs), kwargs["inputs_embeds"], self._pending
        known: ImageMemory | None = getattr(cache, _NAME, None)
        past = 0 if cache is None else int(cache.get_seq_length())
        known = known if past else None
        self._new, self._start, self._past, self._row = [], None, past, None
        if known is not None and known.reducer != id(self.reducer):
            raise UserError("another reducer wrote what this cache looks back at; start with a new cache")
        if fresh is None and known is None:
            self._memory = self._padded = None
            return
        if self.lm.training and getattr(self.lm, "gradient_checkpointing", False):
            raise UserError("gradient checkpointing runs layers again when looking back is over; switch it off")
        if fresh is not None:
            self._pending = None if cache is not None else fresh  # without a cache every step reads it anew
            if embeds.shape[1] <= int(fresh.start.max()):
                raise UserError("the prompt arrives in pieces, but its end is what looks back; no prefill_chunk_size")
            fresh = fresh.repeat(len(embeds))
            self._start, self._new = fresh.start, fresh.pictures
            fresh = fresh.moved(past)
            memory = fresh
            if known is not None:
                memory = replace(fresh, pictures=known.repeat(len(embeds)).pictures + fresh.pictures)
        else:
            memory = known.repeat(len(embeds))  # type: ignore[union-attr]
            self._start = torch.full((len(embeds),), max(0, self._fresh - 1), device=embeds.device)
        self._fresh = 0
        if memory is not self._memory:
            self._memory, self._padded = memory, None
        if self._padded is None and self.reducer.reads == "attention":
            self._padded = PaddedMemory(memory, self.lm.rotary_emb)

    def _leave(self, _: Any, __: Any, out: Any) -> Any:
        cache = cache_of(out)
        if cache is not None and self._memory is not None and self.reducer.reads == "attention":
            setattr(cache, _NAME, self._memory)
        return out

    # Before a layer ---------------------------------------------------------------------------------------------------

    def _before(self, number: int, _: Any, args: tuple[Any, ...]) -> Any:
        if not self._new:
            return None
        hidden, begin = args[0], now(args[0])
        groups: dict[Any, list[MemoryEntry]] = {}
        for entry in self._new:
            groups.setdefault((len(entry.columns), entry.memory.shape), []).append(entry)
        for group in groups.values():
            rows = torch.tensor([entry.row for entry in group], device=hidden.device)[:, None]
            columns = torch.stack([entry.columns for entry in group])
            memory = torch.stack([entry.memory for entry in group])
            assignment = torch.stack([entry.assignment for entry in group])
            x = hidden[rows, columns].to(memory.dtype)
            new = self.reducer(TokenRecall(number, x, memory, assignment))
            hidden = hidden.index_put((rows, columns), new.to(hidden.dtype))
        self.elapsed_ms += 1000 * (now(hidden) - begin)
        return hidden, *args[1:]

    # In a layer's attention -------------------------------------------------------------------------------------------

    def answer(self, number: int, attention: Any, call: AttentionCall, out: Tensor) -> Tensor:
        """What an attention module puts out ``[B, Q, H, d]`` when its asking tokens have looked back."""
        memory = self._padded
        if memory is None or self._start is None:
            return out
        begin, first = now(out), int(self._start.min())
        logits = call.logits(slice(first, None))
        mass = logits.logsumexp(-1)
        if number in self.layers and self._row is not None:
            batch, groups = len(out), call.k.shape[1]

            def turn(keys: Tensor, index: Tensor) -> Tensor:
                keys = keys.unflatten(-1, (groups, -1)).transpose(1, 2)
                if keys.shape[-1] != call.k.shape[-1]:
                    raise UserError(
                        f"'{self.reducer.name}' makes keys of width {keys.shape[-1] * groups}, but this decoder's have "
                        f"{groups * call.k.shape[-1]}; train with reducer.options.key_size={groups * call.k.shape[-1]}"
                    )
                return rotated(
                    attention,
                    keys,
                    gather_rows(memory.cos, index, 1).to(keys),
                    gather_rows(memory.sin, index, 1).to(keys),
                )

            own, kind = out[:, first:], memory.memory.dtype
            look = AttentionRecall(
                number, call.q[:, :, first:].to(kind), call.scaling, own.to(kind), mass, memory.memory, memory.real,
                self._row, turn,
            )  # fmt: skip
            asking = torch.arange(first, out.shape[1], device=out.device) >= self._start[:, None]
            new = torch.where(asking.view(batch, -1, 1, 1), self.reducer(look).to(out.dtype), own)
            out = torch.cat([out[:, :first], new], 1)
        if number + 1 in self.layers:
            with torch.no_grad():
                row = (logits - mass[..., None]).exp().mean(1)
                index = memory.column.clamp_min(0)[:, None].expand(-1, row.shape[1], -1)
                self._row = row.gather(2, index).masked_fill(memory.column[:, None] < 0, 0)
        self.elapsed_ms += 1000 * (now(out) - begin)
        return out


class _RecallProbe(AttentionProbe):
    """A probe that changes what its attention module puts out.

    Attributes:
        view: The config that the module gets.
    """

    def __init__(self, owner: RecallHooks, number: int, attention: Any) -> None:
        super().__init__(attention)
        self.owner, self.number = owner, number
        self.view = View(attention.config, "probe", probe=self)

    def see(self, call: AttentionCall) -> None:
        """Remember the call until its output is there."""
        self.call: AttentionCall | None = call

    def change(self, out: Tensor) -> Tensor:
        """The output with what was recalled."""
        call, self.call = self.call, None
        return out if call is None else self.owner.answer(self.number, self.attention, call, out)


def recall_layers(reducer: RecallReducer, depth: int) -> list[int]:
    """`RecallReducer.recalls`, checked.

    Raises:
        UserError: layers that the decoder lacks, or none; attention that is ranked by that of a layer before the first.
    """
    layers, least = sorted(set(reducer.recalls(depth))), 1 if reducer.reads == "attention" else 0
    if not layers or layers[0] < least or layers[-1] >= depth:
        where = ", ".join(map(str, layers)) or "none"
        raise UserError(
            f"'{reducer.name}' looks back in layers {where}; here it can in the layers {least} to {depth - 1}"
        )
    return layers


def check_attention(model: Any) -> None:
    """Refuse what a row of attention over all of the short stream cannot be read of."""
    config = model.get_decoder().config
    kinds = getattr(config, "layer_types", None) or []
    if any("sliding" in kind for kind in kinds):
        raise UserError(f"'{config.model_type}' forgets keys that slide out of its window, so no row ranks all tokens")
    if "flex" in (config._attn_implementation or "") or "paged" in (config._attn_implementation or ""):
        raise UserError(f"the attention kernel '{config._attn_implementation}' cannot be looked into; use sdpa")
