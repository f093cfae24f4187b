"""Learned tokens that read a picture inside the language model, and what they leave of it: keys and values.

In the first pass the frozen model reads the prompt up to the picture's end, then the learned tokens on that cache, all
by themselves, so that updates that are theirs touch nothing else. The second is ``generate`` on a prompt in which as
many stand-ins take the picture's place, whose keys and values each layer exchanges for those of the first pass. That
happens before any rotary embedding, so positions, caches, beams and masks are the model's own business. A
`CompressedKV` serves any number of questions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lit_reduce.backbones.families import family_of
from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.cache_compat import CACHE, cache_in
from lit_reduce.runtime.call import now
from lit_reduce.runtime.compact import PromptMap, compact, reduce_images
from lit_reduce.runtime.decoder.run import BESIDE
from lit_reduce.runtime.decoder.slot_cache import left_padded
from lit_reduce.runtime.encode import Encoded, placeholders
from lit_reduce.tokens import Budget

PARTS = ("q", "k", "v", "o")
Encode = Callable[[dict[str, Any]], Encoded]


@dataclass(frozen=True)
class CompressedKV:
    """What learned tokens made of the pictures of B prompts, one each.

    Attributes:
        keys: For each layer ``[B, K, Dk]``, before any norm or rotary embedding.
        values: For each layer ``[B, K, Dk]``.
        encoded: The pictures after tower and projector.
        words: For each prompt, the ids before its picture's end, which the learned tokens read, too.
        spent: Milliseconds that it took.
    """

    keys: list[Tensor]
    values: list[Tensor]
    encoded: Encoded
    words: list[list[int]]
    spent: float

    @property
    def kept(self) -> int:
        """K."""
        return self.keys[0].shape[1]

    def of(self, pictures: Sequence[int]) -> "CompressedKV":
        """The digest of some of the pictures, each as often as it is named: for several questions in one batch."""
        order = torch.tensor(pictures, device=self.keys[0].device)
        keys, values = ([x[order] for x in part] for part in (self.keys, self.values))
        words = [self.words[picture] for picture in pictures]
        return CompressedKV(keys, values, self.encoded.each(pictures), words, self.spent)


class _All(Reducer):
    """Leaves the prompt as it is."""

    name = "all"


def digest(model: Any, reducer: Any, inputs: Mapping[str, Any], encoded: Encoded, keep: int) -> CompressedKV:
    """The first pass.

    Args:
        model: The frozen backbone.
        reducer: Of kind ``register`` at the decoder: makes tokens, and has ``update(layer, part, x)``.
        inputs: The prompts.
        encoded: Their pictures.
        keep: Learned tokens, K.

    Returns:
        The digest, with gradients to the reducer where these are on.

    Raises:
        UserError: not exactly one picture in each prompt, or a family or mode that cannot be served.
    """
    start = now(inputs["input_ids"])
    full, _ = compact(model, inputs, encoded, _All(), 1.0)
    ids, mask, places = full["input_ids"], full["attention_mask"].bool(), full["position_ids"]
    if sorted(encoded.samples) != list(range(len(ids))):
        raise UserError(f"'{reducer.name}' takes exactly one picture in each prompt; ask about them one by one")
    visual = placeholders(model, ids)
    columns = torch.arange(ids.shape[1], device=ids.device)
    until = mask & (columns <= (visual * columns).amax(1, keepdim=True))
    order, valid, _ = left_padded(until)
    first = {name: full[name].gather(1, order) for name in ("input_ids", *BESIDE) if full.get(name) is not None}
    words = [row[own].tolist() for row, own in zip(first["input_ids"], valid, strict=True)]
    first["input_ids"] = first["input_ids"].masked_fill(~valid, 0)
    cache = DynamicCache(config=model.get_decoder().config)
    with torch.no_grad():
        model.base_model(
            **first, attention_mask=valid.long(), position_ids=_taken(places, order), use_cache=True,
            **{CACHE: cache}, mm_encoder_outputs=full["mm_encoder_outputs"],
        )  # fmt: skip
    if cache.get_seq_length() != order.shape[1]:
        raise UserError(f"gradient checkpointing takes the cache away that '{reducer.name}' reads; switch it off")
    images = [encoded.samples.index(row) for row in range(len(ids))]
    made, _, kept_indices = reduce_images(encoded, reducer, keep)
    embeds, rows = (torch.stack([part[i] for i in images]) for part in (made, kept_indices))
    own = visual.nonzero()[:, 1].view(len(ids), -1).gather(1, rows)
    seen = torch.cat([valid, valid.new_ones(len(ids), keep)], 1).long()
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}

    def add(number: int, part: str, _: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        out = out + reducer.update(number, part, args[0]).to(out.dtype)
        found[part].append(out)
        return out

    with _hooked(model, PARTS, add):
        model.get_decoder()(
            inputs_embeds=embeds.to(encoded.features[0].dtype), attention_mask=seen,
            position_ids=_taken(places, own),
            use_cache=True, **{CACHE: cache},
        )  # fmt: skip
    return CompressedKV(found["k"], found["v"], encoded, words, 1000 * (now(ids) - start))


@contextmanager
def retold(model: Any, told: CompressedKV, short: Mapping[str, Any]) -> Iterator[None]:
    """The second pass, while it lasts: the next prompt that the model reads is ``short``, told by a digest."""
    columns = (placeholders(model, short["input_ids"]) & short["attention_mask"].bool()).nonzero()[:, 1]
    columns = columns.view(len(short["input_ids"]), told.kept)
    length, active = short["input_ids"].shape[1], False

    def enter(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        nonlocal active
        cache, tokens = cache_in(kwargs), kwargs["inputs_embeds"].shape[1]
        active = tokens >= length and (cache is None or int(cache.get_seq_length()) == 0)

    def exchange(number: int, part: str, _: Any, __: Any, out: Tensor) -> Tensor:
        if not active:
            return out
        times = len(out) // len(columns)  # beams
        rows = (told.keys if part == "k" else told.values)[number].to(out.dtype).repeat_interleave(times, 0)
        return out.scatter(1, columns.repeat_interleave(times, 0)[..., None].expand_as(rows), rows)

    handle = model.get_decoder().register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with _hooked(model, ("k", "v"), exchange):
            yield
    finally:
        handle.remove()


class CompressedKVReader:
    """A reducer of kind ``register`` attached at the decoder.

    Attributes:
        given: The digest that the next prompt is told by; None to make one.
    """

    def __init__(self, model: Any, reducer: Any, keep: Budget) -> None:
        family = family_of(model.config)
        if family.looks_ahead:
            raise UserError(
                f"pictures or words of '{family.name}' see what comes behind them, and so would see the learned tokens "
                f"of '{reducer.name}'; use a reducer at the projector"
            )
        check(model, reducer)
        self.model, self.reducer, self.keep, self.family = model, reducer, keep, family
        self.given: CompressedKV | None = None
        self._reads: tuple[CompressedKV, dict[str, Any]] | None = None

    def digest(self, inputs: dict[str, Any], encode: Encode) -> CompressedKV:
        """The first pass, from the pictures on."""
        encoded = encode(inputs)
        counts = set(encoded.counts)
        if len(counts) != 1:
            raise UserError(
                f"'{self.reducer.name}' takes pictures of equal token count in a batch; give them one by one"
            )
        return digest(self.model, self.reducer, inputs, encoded, self.keep.count(counts.pop()))

    def shorten(self, inputs: dict[str, Any], positions: str, encode: Encode) -> tuple[dict[str, Any], PromptMap]:
        """The prompt with stand-ins for its pictures."""
        told, self.given = self.given, None
        spent = 0.0
        if told is None:
            told = self.digest(inputs, encode)
            spent = told.spent
        elif len(told.words) == 1:
            told = told.of([0] * len(inputs["input_ids"]))
        self._compare(told, inputs)
        short, logical = compact(self.model, inputs, told.encoded, self.reducer, told.kept, positions)
        self._reads = told, short
        return short, replace(logical, reducer_ms=logical.reducer_ms + spent)

    def _compare(self, told: CompressedKV, inputs: Mapping[str, Any]) -> None:
        """Another picture's place, or other words before it, would be answered wrongly in silence."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        for row, words in enumerate(told.words):
            own = ids[row] if mask is None else ids[row][mask[row].bool()]
            if len(told.words) != len(ids) or own[: len(words)].tolist() != words:
                raise UserError(
                    "this digest was made of other pictures, or behind other words; make one with attached.digest from "
                    "prompts that begin alike, one for each row, or one for all"
                )

    @contextmanager
    def reading(self, padded: bool) -> Iterator[None]:
        """While it lasts, the model reads what was shortened last, perhaps with a padding token before it."""
        reads, self._reads = self._reads, None
        if reads is None:
            yield
            return
        told, short = reads
        if padded:
            pad = torch.nn.functional.pad
            short = {name: pad(short[name], (1, 0)) for name in ("input_ids", "attention_mask")}
        with retold(self.model, told, short):
            yield


def check(model: Any, reducer: Any) -> None:
    """Refuse a decoder whose maps have other names or widths than the reducer's updates.

    Raises:
        UserError: one of both.
    """
    for layer in model.get_decoder().layers:
        for part in PARTS:
            linear = getattr(layer.self_attn, f"{part}_proj", None)
            if linear is None:
                raise UserError(
                    f"'{reducer.name}' needs layers with q_proj, k_proj, v_proj and o_proj; this model has none"
                )
            into, out = reducer.down[part].shape[-1], reducer.up[part].shape[-2]
            if (into, out) != (linear.in_features, linear.out_features):
                q, k = layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features
                raise UserError(
                    f"'{reducer.name}' has updates of {into} to {out} where this model has {linear.in_features} to "
                    f"{linear.out_features}; train with reducer.options.query_size={q} reducer.options.key_size={k}"
                )


def _taken(places: Tensor, order: Tensor) -> Tensor:
    """Positions ``[..., B, n]`` of some columns ``[B, n]``."""
    return places.gather(-1, order.expand(*places.shape[:-1], -1))


@contextmanager
def _hooked(model: Any, parts: tuple[str, ...], hook: Callable[..., Tensor]) -> Iterator[None]:
    handles = [
        getattr(layer.self_attn, f"{part}_proj").register_forward_hook(partial(hook, number, part))
        for number, layer in enumerate(model.get_decoder().layers)
        for part in parts
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
