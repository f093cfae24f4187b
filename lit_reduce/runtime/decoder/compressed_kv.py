"""Keys and values that learned tokens leave of an image after they have read it inside the language model.

In the first pass the frozen model reads the prompt up to the image's end, then the learned tokens on that cache, all by
themselves, so that updates that are theirs touch nothing else. The second is ``generate`` on a prompt in which as many
placeholders take the image's place, whose keys and values each layer exchanges for those of the first pass. That
happens before any rotary embedding, so positions, caches, beams and masks are the model's own business. A
`CompressedKV` serves any number of questions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lit_reduce.errors import UserError
from lit_reduce.runtime.cache_compat import CACHE, cache_in
from lit_reduce.runtime.call import now
from lit_reduce.runtime.compact import ReducedImages, reduce_images, shorten, unreduced
from lit_reduce.runtime.decoder.run import BESIDE
from lit_reduce.runtime.encode import Encoded, placeholders
from lit_reduce.runtime.gather import gather_positions, left_padded

PARTS = ("q", "k", "v", "o")


@dataclass(frozen=True)
class CompressedKV:
    """The keys and values of the images of B prompts, one image each.

    Attributes:
        keys: For each layer ``[B, K, Dk]``, before any norm or rotary embedding.
        values: For each layer ``[B, K, Dk]``.
        encoded: The images after tower and projector.
        images: The learned tokens, and where they stand.
        words: For each prompt, the ids up to its image's end, which the learned tokens read, too.
        elapsed_ms: Milliseconds that the pass took.
    """

    keys: list[Tensor]
    values: list[Tensor]
    encoded: Encoded
    images: ReducedImages
    words: list[list[int]]
    elapsed_ms: float

    @property
    def kept(self) -> int:
        """K."""
        return self.keys[0].shape[1]

    def of(self, pictures: Sequence[int]) -> "CompressedKV":
        """Those of some of the images, each as often as it is named: for several questions in one batch."""
        order = torch.tensor(pictures, device=self.keys[0].device)
        keys, values = ([x[order] for x in part] for part in (self.keys, self.values))
        words = [self.words[picture] for picture in pictures]
        encoded, images = self.encoded.each(pictures), self.images.each(pictures)
        return CompressedKV(keys, values, encoded, images, words, self.elapsed_ms)


def compress(model: Any, reducer: Any, inputs: Mapping[str, Any], encoded: Encoded, keep: int) -> CompressedKV:
    """Run the first pass: the learned tokens read the images.

    Args:
        model: The frozen backbone.
        reducer: Of kind ``register`` at the decoder: makes tokens, and has ``update(layer, part, x)``.
        inputs: The prompts.
        encoded: Their images.
        keep: Learned tokens, K.

    Returns:
        With gradients to the reducer where these are on.

    Raises:
        UserError: not exactly one image in each prompt, or a family or mode that cannot be served.
    """
    start = now(inputs["input_ids"])
    full, _ = shorten(model, inputs, encoded, unreduced(encoded))
    ids, mask, position_ids = full["input_ids"], full["attention_mask"].bool(), full["position_ids"]
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
            **first, attention_mask=valid.long(), position_ids=gather_positions(position_ids, order), use_cache=True,
            **{CACHE: cache}, mm_encoder_outputs=full["mm_encoder_outputs"],
        )  # fmt: skip
    if cache.get_seq_length() != order.shape[1]:
        raise UserError(f"gradient checkpointing takes the cache away that '{reducer.name}' reads; switch it off")
    images = reduce_images(encoded, reducer, keep)
    entries = [encoded.samples.index(row) for row in range(len(ids))]
    embeds, rows = (torch.stack([part[i] for i in entries]) for part in (images.features, images.kept_indices))
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
            position_ids=gather_positions(position_ids, own),
            use_cache=True, **{CACHE: cache},
        )  # fmt: skip
    return CompressedKV(found["k"], found["v"], encoded, images, words, 1000 * (now(ids) - start))


@contextmanager
def injected(model: Any, compressed: CompressedKV, short: Mapping[str, Any]) -> Iterator[None]:
    """The second pass: within the ``with`` block the next prompt, ``short``, reads these keys and values."""
    columns = (placeholders(model, short["input_ids"]) & short["attention_mask"].bool()).nonzero()[:, 1]
    columns = columns.view(len(short["input_ids"]), compressed.kept)
    length, active = short["input_ids"].shape[1], False

    def enter(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        nonlocal active
        cache, tokens = cache_in(kwargs), kwargs["inputs_embeds"].shape[1]
        active = tokens >= length and (cache is None or int(cache.get_seq_length()) == 0)

    def exchange(number: int, part: str, _: Any, __: Any, out: Tensor) -> Tensor:
        if not active:
            return out
        times = len(out) // len(columns)  # beams
        rows = (compressed.keys if part == "k" else compressed.values)[number].to(out.dtype).repeat_interleave(times, 0)
        return out.scatter(1, columns.repeat_interleave(times, 0)[..., None].expand_as(rows), rows)

    handle = model.get_decoder().register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with _hooked(model, ("k", "v"), exchange):
            yield
    finally:
        handle.remove()


def check_projections(model: Any, reducer: Any) -> None:
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
