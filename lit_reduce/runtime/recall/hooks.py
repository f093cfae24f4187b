"""Reducers of kind ``recall`` at work: layers of the language model look back at pictures that entered it shortened.

What is looked back at, the bank, stands beside the sequence and beside its cache: neither grows, and transformers
never learns of it. Hooks before layers change the hidden states of the short stream; taps on attention modules add to
what their kernels put out for the tokens that ask. Both leave the kernels alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.recall import AttentionRecall, RecallReducer, TokenRecall
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.attention.probe import AttentionProbe, Call
from lit_reduce.runtime.cache_compat import cache_in, cache_of
from lit_reduce.runtime.call import now
from lit_reduce.runtime.compact import PromptMap
from lit_reduce.runtime.decoder.prefill_state import Prompt
from lit_reduce.runtime.decoder.slot_cache import take
from lit_reduce.runtime.recall.rotary import rotated

_NAME = "_lit_reduce_bank"  # kept on the cache itself, so that it follows copies and dies with it


@dataclass(frozen=True)
class MemoryEntry:
    """What is kept of one picture.

    Attributes:
        row: Which sample of the batch it belongs to.
        columns: ``[K]``, where its short stream stands in the sequence.
        memory: ``[N, S]``, see `Reduction.memory`.
        owner: ``[N]``, see `Reduction.assignment`.
        places: ``[N]`` positions of its tokens in the full prompt, or ``[R, N]``.
    """

    row: int
    columns: Tensor
    memory: Tensor
    owner: Tensor
    places: Tensor


@dataclass(frozen=True)
class ImageMemory:
    """The pictures of a batch, and which of its tokens ask.

    Attributes:
        pictures: Those that were shortened.
        start: ``[B]``, in the pass that reads the prompt, the column of each sample's first asking token.
        batch: B.
        reducer: The ``id`` of the reducer whose memory it is.
    """

    pictures: list[MemoryEntry]
    start: Tensor
    batch: int
    reducer: int

    @classmethod
    def of(
        cls, model: Any, reducer: Reducer, inputs: Mapping[str, Any], short: dict[str, Any], logical: PromptMap
    ) -> "ImageMemory | None":
        """The bank of what `compact` shortened, or None where nothing looks back.

        Args:
            model: The backbone.
            reducer: Who shortened.
            inputs: Of the full prompt.
            short: What `compact` returned.
            logical: Likewise.
        """
        if not logical.memories:
            return None
        prompt, ids = Prompt.of(model, short, logical.kept, logical.grids), inputs["input_ids"]
        whole = Prompt.of(model, {"input_ids": ids}, logical.total, logical.grids)
        held = []
        for i, (memory, owner) in logical.memories.items():
            row, columns = whole.pictures[i].row, whole.pictures[i].columns
            held.append(
                MemoryEntry(row, prompt.pictures[i].columns, memory, owner, logical.positions[..., row, columns])
            )
        return cls(held, prompt.last, len(ids), id(reducer))

    def moved(self, by: int) -> "ImageMemory":
        """The bank of a prompt with so many more columns before it."""
        pictures = [replace(held, columns=held.columns + by) for held in self.pictures]
        return replace(self, pictures=pictures, start=self.start + by)

    def repeat(self, batch: int) -> "ImageMemory":
        """The bank of a batch whose samples were each repeated, for beams or several answers."""
        times = batch // self.batch
        if times == 1:
            return self
        pictures = [replace(held, row=held.row * times + i) for held in self.pictures for i in range(times)]
        return replace(self, pictures=pictures, start=self.start.repeat_interleave(times), batch=batch)


class PaddedMemory:
    """A bank in tensors: what layers ask, all pictures of a sample behind one another, padded.

    Attributes:
        memory: ``[B, N, S]``.
        real: ``[B, N]``.
        column: ``[B, N]``, where in the sequence the token stands that each one went into; -1 for none.
        cos: ``[B, N, d]``, of its position.
        sin: Likewise.
    """

    def __init__(self, bank: ImageMemory, rotary: Any) -> None:
        rows: list[list[MemoryEntry]] = [
            [held for held in bank.pictures if held.row == row] for row in range(bank.batch)
        ]
        longest = max(sum(len(held.memory) for held in row) for row in rows)

        def lay(read: Callable[[MemoryEntry], Tensor], fill: float = 0) -> Tensor:
            some = read(bank.pictures[0])
            out = [torch.cat([read(held) for held in row]) if row else some[:0] for row in rows]
            wide = [0, 0] * (some.ndim - 1)
            return torch.stack([torch.nn.functional.pad(x, [*wide, 0, longest - len(x)], value=fill) for x in out])

        self.memory, self.real = lay(lambda held: held.memory), lay(lambda held: torch.ones_like(held.owner)) > 0
        self.column = lay(lambda held: held.columns[held.owner.clamp_min(0)].masked_fill(held.owner < 0, -1), -1)
        places = lay(lambda held: held.places.movedim(-1, 0))
        # Rows beside the text's, where a family has them: frames, rows and columns of pictures.
        places = places if places.ndim == 2 else places.movedim(-1, 0)[1:]
        self.cos, self.sin = rotary(self.memory, places)


class RecallHooks:
    """The hooks of a reducer that looks back.

    Attributes:
        spent: Milliseconds that its looking back took in the last call of the model.
    """

    def __init__(self, model: Any, reducer: RecallReducer) -> None:
        self.model, self.lm, self.reducer = model, model.get_decoder(), reducer
        self.layers = frozenset(recall_layers(reducer, len(self.lm.layers)))
        self.spent = 0.0
        self._pending: ImageMemory | None = None
        self._fresh = 0
        self._rest()
        self._handles = [
            self.lm.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.lm.register_forward_hook(self._leave),
        ]
        self._taps: list[_Beside] = []
        if reducer.reads == "tokens":
            for number in self.layers:
                before = partial(self._before, number)
                self._handles.append(self.lm.layers[number].register_forward_pre_hook(before))
        else:
            _check_attention(model)
            for number in sorted(self.layers | {number - 1 for number in self.layers}):
                self._taps.append(_Beside(self, number, self.lm.layers[number].self_attn))

    def remove(self) -> None:
        """Take the hooks away; harmless when repeated."""
        for handle in self._handles:
            handle.remove()
        for tap in self._taps:
            tap.__exit__()
        self._taps = []
        self._rest()

    @contextmanager
    def reading(self, bank: ImageMemory | None, fresh: int = 0) -> Iterator[None]:
        """While it lasts, the next pass through the language model reads a prompt.

        Args:
            bank: Its pictures, or None: those that its cache knows.
            fresh: Then, the tokens that are not in the cache; only the last of them asks.
        """
        self._pending, self._fresh, self.spent = bank, fresh, 0.0
        try:
            yield
        finally:
            self._pending, self._fresh = None, 0
            self._rest()

    def _rest(self) -> None:
        self._bank: ImageMemory | None = None
        self._laid: PaddedMemory | None = None
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
            self._bank = self._laid = None
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
            bank = (
                fresh if known is None else replace(fresh, pictures=known.repeat(len(embeds)).pictures + fresh.pictures)
            )
        else:
            bank = known.repeat(len(embeds))  # type: ignore[union-attr]
            self._start = torch.full((len(embeds),), max(0, self._fresh - 1), device=embeds.device)
        self._fresh = 0
        if bank is not self._bank:
            self._bank, self._laid = bank, None
        if self._laid is None and self.reducer.reads == "attention":
            self._laid = PaddedMemory(bank, self.lm.rotary_emb)

    def _leave(self, _: Any, __: Any, out: Any) -> Any:
        cache = cache_of(out)
        if cache is not None and self._bank is not None and self.reducer.reads == "attention":
            setattr(cache, _NAME, self._bank)
        return out

    # Before a layer ---------------------------------------------------------------------------------------------------

    def _before(self, number: int, _: Any, args: tuple[Any, ...]) -> Any:
        if not self._new:
            return None
        hidden, begin = args[0], now(args[0])
        groups: dict[Any, list[MemoryEntry]] = {}
        for held in self._new:
            groups.setdefault((len(held.columns), held.memory.shape), []).append(held)
        for group in groups.values():
            rows = torch.tensor([held.row for held in group], device=hidden.device)[:, None]
            columns = torch.stack([held.columns for held in group])
            memory = torch.stack([held.memory for held in group])
            owner = torch.stack([held.owner for held in group])
            x = hidden[rows, columns].to(memory.dtype)
            new = self.reducer(TokenRecall(number, x, memory, owner))
            hidden = hidden.index_put((rows, columns), new.to(hidden.dtype))
        self.spent += 1000 * (now(hidden) - begin)
        return hidden, *args[1:]

    # In a layer's attention -------------------------------------------------------------------------------------------

    def answer(self, number: int, attention: Any, call: Call, out: Tensor) -> Tensor:
        """What an attention module puts out ``[B, Q, H, d]`` when its asking tokens have looked back."""
        bank = self._laid
        if bank is None or self._start is None:
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
                return rotated(attention, keys, take(bank.cos, index, 1).to(keys), take(bank.sin, index, 1).to(keys))

            own, kind = out[:, first:], bank.memory.dtype
            look = AttentionRecall(
                number, call.q[:, :, first:].to(kind), call.scaling, own.to(kind), mass, bank.memory, bank.real,
                self._row, turn,
            )  # fmt: skip
            asking = torch.arange(first, out.shape[1], device=out.device) >= self._start[:, None]
            new = torch.where(asking.view(batch, -1, 1, 1), self.reducer(look).to(out.dtype), own)
            out = torch.cat([out[:, :first], new], 1)
        if number + 1 in self.layers:
            with torch.no_grad():
                row = (logits - mass[..., None]).exp().mean(1)
                index = bank.column.clamp_min(0)[:, None].expand(-1, row.shape[1], -1)
                self._row = row.gather(2, index).masked_fill(bank.column[:, None] < 0, 0)
        self.spent += 1000 * (now(out) - begin)
        return out


class _Beside(AttentionProbe):
    """A tap that changes what its attention module puts out."""

    def __init__(self, owner: RecallHooks, number: int, attention: Any) -> None:
        super().__init__(attention)
        self.owner, self.number = owner, number
        self.__enter__()

    def see(self, call: Call) -> None:
        """Remember the call until its output is there."""
        self.call: Call | None = call

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


@contextmanager
def looking_back(model: Any, reducer: Reducer, bank: ImageMemory | None) -> Iterator[None]:
    """Hooks for passes over one prompt, as training needs them; nothing where the reducer does not look back."""
    if not isinstance(reducer, RecallReducer):
        yield
        return
    recalling = RecallHooks(model, reducer)
    try:
        with recalling.reading(bank):
            yield
    finally:
        recalling.remove()


def _check_attention(model: Any) -> None:
    """Refuse what a row of attention over all of the short stream cannot be read of."""
    config = model.get_decoder().config
    kinds = getattr(config, "layer_types", None) or []
    if any("sliding" in kind for kind in kinds):
        raise UserError(f"'{config.model_type}' forgets keys that slide out of its window, so no row ranks all tokens")
    if "flex" in (config._attn_implementation or "") or "paged" in (config._attn_implementation or ""):
        raise UserError(f"the attention kernel '{config._attn_implementation}' cannot be looked into; use sdpa")
