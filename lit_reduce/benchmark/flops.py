"""What one answer costs, from the sizes of the model and the number of tokens in each layer.

Convention: one multiply-add is 2 floating-point operations (FLOPs). Counted are the products of every weight matrix
with its tokens, the convolution that cuts patches, and both products of attention over the whole rectangle of queries
and keys, as torch's ``FlopCounterMode`` counts them; a causal kernel may leave out up to half of that rectangle. The
output head is counted for the last position only, which is all that ``generate`` asks for. Left out are norms,
activations, softmax, rotary embeddings, table look-ups and sampling; sliding windows are priced like full attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lit_reduce.backbones.families import family_of
from lit_reduce.backbones.towers import ATTENTION, MLP, part, tower_of
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.handlers import handlers_for
from lit_reduce.runtime.layer_tokens import LayerTokens
from lit_reduce.tokens import Budget

CONV = (nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Cost:
    """FLOPs of a whole batch.

    Attributes:
        tower: The vision tower.
        projector: From the tower's width to the language model's, with the merger.
        reducer: The reducer itself, as counted by torch while it ran: a reducer is arbitrary code.
        prefill: The language model over the prompt, and the output head once for each prompt.
        decode: One further token for each prompt, the first behind the prompt.
        kv_bytes: Keys and values that the prompt leaves in the cache.
    """

    tower: int
    projector: int
    reducer: int
    prefill: int
    decode: int
    kv_bytes: int

    @property
    def first_token(self) -> int:
        """All that comes before the first token."""
        return self.tower + self.projector + self.reducer + self.prefill


@dataclass(frozen=True)
class Block:
    """One transformer block, as its matrix products see it.

    Attributes:
        attention: Weights in the matrices of its attention.
        mlp: Weights in all its other matrices.
        width: Channels of its queries, over all heads.
    """

    attention: int
    mlp: int
    width: int

    def flops(self, tokens: int, pairs: int, after: int | None = None) -> int:
        """FLOPs for ``tokens`` queries and ``pairs`` of query and key; ``after`` of the tokens go on to the MLP."""
        left = tokens if after is None else after
        return 2 * self.attention * tokens + 4 * self.width * pairs + 2 * self.mlp * left


def price(
    model: Any,
    inputs: Mapping[str, Tensor],
    reducer: Reducer | None = None,
    keep: int | None = None,
    arrived: int | None = None,
    reducer_flops: int = 0,
) -> Cost:
    """The cost of a batch of equal-length prompts with one picture each.

    Args:
        model: The backbone.
        inputs: Its inputs, without padding.
        reducer: Its handler (`SiteHandler.thin`) says how many tokens each layer sees.
        keep: The budget of each picture, in tokens.
        arrived: Visual tokens that entered the language model, where an encoder reducer decides that.
        reducer_flops: What `Cost.reducer` is to say.
    """
    ids = inputs["input_ids"]
    batch, length = ids.shape
    tokens = layer_tokens(model, inputs, reducer, keep, arrived)
    visual = image_tokens(model, inputs)
    prompt, cached = ([length - visual + count for count in counts] for counts in (tokens.decoder, tokens.cached))
    prefill = prefill_flops(model, prompt, batch)
    if new := tokens.extra_pass:
        until, blocks = 1 + int((ids[0] == model.config.image_token_id).nonzero()[-1]), decoder_blocks(model)
        prefill += batch * sum(x.flops(until, until**2) + x.flops(new, new * (until + new)) for x in blocks)
    tower, projector = encoder_flops(model, inputs, reducer, keep)
    return Cost(
        tower, projector, reducer_flops, prefill, decode_flops(model, cached, batch),
        kv_bytes(model, cached, batch),
    )  # fmt: skip


def layer_tokens(
    model: Any,
    inputs: Mapping[str, Tensor],
    reducer: Reducer | None = None,
    keep: int | None = None,
    arrived: int | None = None,
) -> LayerTokens:
    """Tokens of one picture in each layer of tower and language model; see `price` for the arguments."""
    visual, depth = image_tokens(model, inputs), decoder_depth(model)
    each, blocks = 0, 0
    if inputs.get("pixel_values") is not None:
        tower = tower_of(model)
        # Budgets count the patches of an image or tile; in a tower that packs its images, visual tokens.
        packed = family_of(model.config).row(model) is not None
        each = visual if packed else tower_segments(model, inputs, 0, tower.prefix)[0] - tower.prefix
        blocks = len(tower.blocks)
    patches = [each] * blocks
    tokens = LayerTokens(patches, patches, [0] * blocks, each, [visual] * depth, [visual] * depth, arrived=arrived)
    if reducer is not None and keep is not None:
        for handler in handlers_for(model, {reducer.site: (reducer, Budget(keep))}):
            tokens = handler.thin(tokens)
    return tokens


def image_tokens(model: Any, inputs: Mapping[str, Tensor]) -> int:
    """Visual tokens of each prompt."""
    return int((inputs["input_ids"][0] == model.config.image_token_id).sum())


def prefill_flops(model: Any, prompt: Sequence[int], batch: int = 1) -> int:
    """FLOPs of the language model for a prompt of ``prompt[l]`` tokens in layer ``l``, with the head once a prompt."""
    layers = zip(decoder_blocks(model), prompt, strict=True)
    return batch * (sum(block.flops(n, n * n) for block, n in layers) + head_flops(model))


def decode_flops(model: Any, cached: Sequence[int], batch: int = 1) -> int:
    """FLOPs of one new token for each prompt, behind ``cached[l]`` tokens in layer ``l``."""
    layers = zip(decoder_blocks(model), cached, strict=True)
    return batch * (sum(block.flops(1, n + 1) for block, n in layers) + head_flops(model))


def kv_bytes(model: Any, cached: Sequence[int], batch: int = 1) -> int:
    """Bytes of keys and values for ``cached[l]`` tokens in layer ``l``, in the model's own precision."""
    config = model.config.get_text_config()
    width = _head_width(config) * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return int(2 * batch * sum(cached) * width * model.dtype.itemsize)


def head_flops(model: Any) -> int:
    """FLOPs of the output head at one position."""
    return 2 * int(model.get_output_embeddings().weight.numel())


def decoder_depth(model: Any) -> int:
    """Layers of the language model."""
    return len(model.get_decoder().layers)


def decoder_blocks(model: Any) -> list[Block]:
    """The layers of the language model."""
    config = model.config.get_text_config()
    return _blocks(model.get_decoder().layers, _head_width(config) * config.num_attention_heads)


def encoder_flops(
    model: Any, inputs: Mapping[str, Tensor], reducer: Reducer | None = None, keep: int | None = None
) -> tuple[int, int]:
    """FLOPs of the tower and of the projector for the pictures of a batch.

    What lies between tower and language model costs its matrices once for each visual token. A reducer inside the tower
    is taken to thin out windows (Qwen2.5-VL) alike. Where a model projects
    patches that it then leaves out (LLaVA-NeXT, LLaVA-OneVision) or has side outlets of the tower (Qwen3-VL), the
    projector's figure is a lower bound.
    """
    if inputs.get("pixel_values") is None:
        return 0, 0
    tower, whole = tower_of(model), model.get_encoder("image")
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    segments = [tower_segments(model, inputs, index, tower.prefix) for index in range(len(tower.blocks))]
    plain, tokens = layer_tokens(model, inputs), layer_tokens(model, inputs, reducer, keep)
    each, registers = plain.projected, tokens.registers
    flops = sum(_conv_flops(x, inputs, segments[0], tower.prefix) for x in whole.modules() if isinstance(x, CONV))
    blocks = _blocks(tower.blocks, _width(tower.blocks[0]))
    for block, lengths, before, after in zip(blocks, segments, tokens.patches, tokens.mlp_patches, strict=True):
        seen = [tower.prefix + (n - tower.prefix) * before / each for n in lengths]
        left = sum(tower.prefix + (n - tower.prefix) * after / each for n in lengths)
        flops += block.flops(round(sum(seen)), round(sum(n * n for n in seen)), round(left))
    for number, (block, lengths, rows) in enumerate(zip(blocks, segments, registers, strict=True)):
        seen_by = 2 if number >= tower.depth else 1  # behind the block that feeds the projector patches see them too
        flops += block.flops(rows * len(lengths), sum(rows * (seen_by * n + rows) for n in lengths))
    projected = visual * tokens.projected // each + max(registers) * len(segments[0])
    inside = [x for name, x in whole.named_modules() if name == "merger"]
    outside = [x for name, x in model.base_model.named_children() if "project" in name or "connector" in name]
    return flops, 2 * projected * sum(map(_weights, [*inside, *outside]))


def tower_segments(model: Any, inputs: Mapping[str, Tensor], block: int, prefix: int = 0) -> list[int]:
    """Lengths of the rows of patches that look at one another in a block of the tower, prefix tokens included."""
    vision = model.config.vision_config
    sides = vision.patch_size if isinstance(vision.patch_size, list | tuple) else [vision.patch_size] * 2
    if (grids := inputs.get("image_grid_thw")) is not None:
        windowed = block not in getattr(vision, "fullatt_block_indexes", [block])
        merge = vision.spatial_merge_size
        side = vision.window_size // merge // sides[0] * merge if windowed else 0
        cut = [(_parts(h, side), _parts(w, side)) for t, h, w in grids.tolist() for _ in range(t)]
        return [row * column for rows, columns in cut for row in rows for column in columns]
    if vision.model_type == "pixtral":  # all pictures in one row, and a mask between them
        return [sum((int(h) // sides[0]) * (int(w) // sides[1]) for h, w in inputs["image_sizes"])]
    pixels = inputs["pixel_values"].flatten(0, -4)
    tiles = int((pixels != 0).flatten(1).any(1).sum())  # tiles of zeros are padding
    return [prefix + (pixels.shape[-2] // sides[0]) * (pixels.shape[-1] // sides[1])] * tiles


def _conv_flops(conv: Any, inputs: Mapping[str, Tensor], segments: list[int], prefix: int) -> int:
    """The convolution sees every patch; where one row holds all pictures (Pixtral), also those of their padding."""
    weights, pixels = _weights(conv), inputs["pixel_values"]
    if inputs.get("image_sizes") is not None and pixels.ndim == 4:
        return 2 * weights * (pixels.numel() // int(conv.weight[0].numel()))
    return 2 * weights * sum(n - prefix for n in segments)


def _parts(length: int, size: int) -> list[int]:
    whole, rest = divmod(length, size) if size else (0, length)
    return [size] * whole + [rest] * (rest > 0)


def _blocks(layers: Any, width: int) -> list[Block]:
    mlps = [_weights(part(layer, MLP)) for layer in layers]
    return [Block(_weights(layer) - mlp, mlp, width) for layer, mlp in zip(layers, mlps, strict=True)]


def _weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.ndim > 1)


def _width(block: nn.Module) -> int:
    """Channels of the queries: what the last matrix of attention reads."""
    last = [x for x in part(block, ATTENTION).modules() if isinstance(x, nn.Linear)][-1]
    return int(last.in_features)


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
