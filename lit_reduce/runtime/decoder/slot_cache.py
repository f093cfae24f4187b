"""Cache layers that hold only some of the tokens that transformers counts.

To transformers the sequence stays as long as it was: ids, masks, positions and the reported length are *logical*. A
layer stores keys and values of a *physical* subset, and beside them the logical slot of each stored key. From the slots
alone every mask of a layer follows, so no model needs to know that anything is missing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from lit_reduce.errors import UserError
from lit_reduce.runtime.gather import gather_filled, gather_rows, left_padded

PAD = -1  # slot of an entry that fills a row up: no query sees it


class Entries(NamedTuple):
    """What the next ``update`` of a layer brings.

    Attributes:
        slots: ``[B, n]`` of the tokens.
        step: By how much the logical sequence grows.
        plain: Whether these are all tokens of this step, in their order.
        padded: Whether some slots are `PAD`.
    """

    slots: Tensor
    step: int
    plain: bool
    padded: bool


class SlotLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """A growing cache layer with the slot of every entry.

    Attributes:
        slots: ``[B, n]`` logical slots of what is stored, None when empty.
        logical: The length that transformers sees.
        plain: Whether nothing was dropped, so that slots count 0, 1, 2, ...
        padded: Whether some slots are `PAD`.
    """

    keys: Any
    values: Any
    slots: Tensor | None = None
    logical: Any = 0
    plain: bool = True
    padded: bool = False
    _next: Entries | None = None

    def expect(self, entries: Entries) -> None:
        """Say what the next `update` brings: attention passes on keys and values, but not which tokens they are."""
        self._next = entries

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the expected entries; returns all keys and values."""
        entries = self._taken()
        self.slots = entries.slots if self.slots is None else torch.cat([self.slots, entries.slots], 1)
        self.logical += entries.step
        self.plain = self.plain and entries.plain
        self.padded = self.padded or entries.padded
        result: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return result

    def _taken(self) -> Entries:
        entries, self._next = self._next, None
        if entries is None:
            raise UserError(
                "this cache was made by a model with a reducer attached, and holds only some of the tokens; "
                "continue with the reducer attached, or start with a new cache"
            )
        return entries

    def key_slots(self, new: Tensor, step: int) -> Tensor:  # noqa: ARG002  (the static layer needs it)
        """Slots of all keys that attention will see when ``new`` is stored, at a step of that many logical tokens."""
        return new if self.slots is None else torch.cat([self.slots, new], 1)

    def before(self) -> int:
        """Stored entries, the column of the next one."""
        return 0 if self.slots is None else self.slots.shape[1]

    def evict(self, keep: Tensor) -> None:
        """Forget all entries but ``keep`` ``[B, n]`` bool; counts may differ between samples."""
        if self.slots is None:
            return
        order, valid, padded = left_padded(keep)
        self.keys, self.values = gather_rows(self.keys, order, 2), gather_rows(self.values, order, 2)
        self.slots = gather_filled(self.slots, order, valid, PAD)
        self.plain, self.padded = False, padded

    def get_seq_length(self) -> Any:
        """The logical length."""
        return self.logical

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        """Length and offset of the logical mask."""
        return self.logical + query_length, 0

    def reset(self) -> None:
        """Empty the layer."""
        self.slots, self.logical, self.plain, self.padded, self._next = None, 0, True, False, None
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take away the last tokens; transformers takes back text that it only guessed, which is never dropped."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.slots is not None:
            self.slots = self.slots[:, : -abs(tokens_to_remove)]
            self.logical -= abs(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow beams."""
        super().reorder_cache(beam_idx)
        if self.slots is not None:
            self.slots = self.slots.index_select(0, beam_idx.to(self.slots.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        super().batch_repeat_interleave(repeats)
        if self.slots is not None:
            self.slots = self.slots.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)
        if self.slots is not None:
            self.slots = self.slots[indices]


class StaticSlotLayer(StaticLayer):  # type: ignore[misc]
    """`SlotLayer` on a cache of fixed size: the physical length is cut to what stays, the mask is for the logical one.

    Slots and logical length are tensors at fixed addresses, so that compiled decode steps update them in place.
    """

    slots: Tensor | None = None
    logical: Any = 0
    plain: bool = True
    padded: bool = True  # entries that are not yet written are PAD
    logical_max: int = 0
    _next: Entries | None = None
    expect = SlotLayer.expect
    _taken = SlotLayer._taken

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the expected entries; returns all keys and values, with what is not yet written."""
        entries = self._taken()
        slots = entries.slots
        if not self.is_initialized:  # what is stored now, and room for the tokens that may still come
            self.max_cache_len += slots.shape[1] - entries.step
            self.lazy_initialization(key_states, value_states)
        if self.slots is None:
            self._allocate(key_states)
        where = torch.arange(slots.shape[1], device=slots.device) + self.cumulative_length
        self.slots.index_copy_(1, where, slots)  # type: ignore[union-attr]
        self.logical.add_(entries.step)
        self.plain = self.plain and entries.plain
        result: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return result

    def _allocate(self, like: Tensor) -> None:
        self.slots = torch.full((len(like), self.max_cache_len), PAD, dtype=torch.long, device=like.device)
        self.logical = torch.zeros((), dtype=torch.long, device=like.device)
        for tensor in (self.slots, self.logical):
            torch._dynamo.mark_static_address(tensor)

    def key_slots(self, new: Tensor, step: int) -> Tensor:
        """Slots of all keys that attention will see when ``new`` is stored, at a step of that many logical tokens."""
        if self.slots is None:  # the first write also sets the size, see `update`
            return torch.nn.functional.pad(new, (0, self.max_cache_len - step), value=PAD)
        where = torch.arange(new.shape[1], device=new.device) + self.cumulative_length
        return self.slots.index_copy(1, where, new)

    def before(self) -> int:
        """Stored entries, the column of the next one."""
        return 0 if self.slots is None else int(self.cumulative_length)

    def evict(self, keep: Tensor) -> None:  # noqa: ARG002
        """Not possible: the size is fixed."""
        raise UserError("a cache of fixed size cannot forget entries; leave out cache_implementation='static'")

    def get_seq_length(self) -> Any:
        """The logical length."""
        return self.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Length and offset of the logical mask."""
        return self.logical_max, 0

    def reset(self) -> None:
        """Empty the layer; it keeps its size, so the next prompt must keep as many tokens."""
        super().reset()
        if self.slots is not None:
            self.slots.fill_(PAD)
            self.logical.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow beams."""
        super().reorder_cache(beam_idx)
        if self.slots is not None:
            self.slots = self.slots.index_select(0, beam_idx.to(self.slots.device))


def slotted(cache: Any) -> bool:
    """Whether a cache knows slots."""
    return cache is not None and any(isinstance(layer, SlotLayer | StaticSlotLayer) for layer in cache.layers)


def use_slots(cache: Cache, depth: int) -> None:
    """Turn a cache into one that knows slots, in place: its identity and settings stay. Harmless when repeated.

    Args:
        cache: One made without a config has no layers yet.
        depth: Layers of the language model.

    Raises:
        UserError: a kind of cache whose entries cannot be told apart.
    """
    if getattr(cache, "offloading", False):
        raise UserError("an offloaded cache cannot hold some of the tokens only; leave out cache_implementation")
    if cache.layer_class_to_replicate is not None:
        missing = range(len(cache.layers), depth)
        cache.layers.extend(cache.layer_class_to_replicate() for _ in missing)
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, SlotLayer | StaticSlotLayer):
            cache.layers[i] = _slot_layer(layer)


def _slot_layer(layer: Any) -> SlotLayer | StaticSlotLayer:
    if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
        layer = DynamicLayer()  # the logical mask carries the window
    if type(layer) is StaticLayer and not layer.is_initialized:
        static: StaticSlotLayer = StaticSlotLayer.__new__(StaticSlotLayer)
        static.__dict__.update(layer.__dict__)
        static.logical_max = layer.max_cache_len
        return static
    if type(layer) is not DynamicLayer:
        raise UserError(
            f"a cache with layers of type {type(layer).__name__}{' in use' if layer.is_initialized else ''} "
            "cannot hold some of the tokens only; use the default cache"
        )
    new = SlotLayer()
    new.__dict__.update(layer.__dict__)
    if layer.is_initialized and layer.keys.numel():  # an earlier turn, in which nothing was dropped
        new.logical = layer.keys.shape[2]
        new.slots = torch.arange(new.logical, device=layer.keys.device).expand(len(layer.keys), -1)
    return new
