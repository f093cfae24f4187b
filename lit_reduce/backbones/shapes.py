"""Backbones by shape: the layers of a well-known model with random weights, to time what does not depend on weights.

``shape:llava-1.5-7b`` has every matrix of LLaVA-1.5 7B in its published size, so its kernels, caches and memory are
those of the real model; its answers are noise. It has no processor: `example` makes inputs of any length.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_reduce.errors import UserError

PREFIX = "shape:"
BLOCK = 1000003  # weights repeat one block of noise; a prime length, so that no two rows are alike


def smolvlm_256m() -> Any:
    """SmolVLM-256M: SigLIP-B/16 at 512 px, pixel shuffle by 4 (64 tokens a tile), SmolLM2-135M."""
    from transformers import Idefics3Config, LlamaConfig

    text = LlamaConfig(
        vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, pad_token_id=2, bos_token_id=1,
        eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 512, "patch_size": 16,
    }  # fmt: skip
    return Idefics3Config(
        text_config=text, vision_config=vision, scale_factor=4, image_token_id=49190, pad_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip


def llava_1_5_7b() -> Any:
    """LLaVA-1.5 7B: CLIP-L/14 at 336 px (576 tokens), a two-layer projector, Vicuna 7B."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768, vocab_size=32000,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5, pad_token_id=32001,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=32000, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=576,
    )  # fmt: skip


def qwen2_5_vl_3b() -> Any:
    """Qwen2.5-VL 3B: a window-attention tower that merges 2 x 2 patches of 14 px, Qwen2.5 3B."""
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "rope_parameters": rope, "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 2048,
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=151655, video_token_id=151656,
        vision_start_token_id=151652, vision_end_token_id=151653, tie_word_embeddings=True,
    )  # fmt: skip


SHAPES: dict[str, Callable[[], Any]] = {
    "smolvlm-256m": smolvlm_256m,
    "llava-1.5-7b": llava_1_5_7b,
    "qwen2.5-vl-3b": qwen2_5_vl_3b,
}


class NoProcessor:
    """Stands where a processor would be and says why there is none."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UserError("a shape: backbone has random weights and reads neither pictures nor words; it is for bench")


def load_shape(name: str, dtype: torch.dtype | str, device: torch.device) -> Any:
    """The model of ``shape:NAME``; the dtype ``auto`` is bfloat16, in which these checkpoints are published.

    Raises:
        UserError: no such shape.
    """
    model = build(config_of(name), torch.bfloat16 if isinstance(dtype, str) else dtype, device)
    model.name_or_path = name
    return model


def config_of(name: str) -> Any:
    """The config of ``shape:NAME``.

    Raises:
        UserError: no such shape.
    """
    word = name.removeprefix(PREFIX)
    if word not in SHAPES:
        raise UserError(f"no backbone has the shape '{word}'; known: {', '.join(PREFIX + shape for shape in SHAPES)}")
    return SHAPES[word]()


def build(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of this config with random weights, made where it will run; nothing is initialised twice.

    Norms are one and biases zero; all other weights are uniform with the spread that Llama starts with, so that no
    value grows out of its precision on the way.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    with no_init_weights(), device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.tie_weights()
    noise = torch.rand(BLOCK, generator=torch.Generator().manual_seed(0)).sub(0.5).mul(0.07).to(device, dtype)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            flat = weight.data.view(-1)
            for start in range(0, len(flat), BLOCK):
                part = flat[start : start + BLOCK]
                part.copy_(noise[: len(part)])
        else:
            weight.data.fill_(0.0 if "bias" in name else 1.0)
    model.generation_config.eos_token_id = None  # random weights would end answers at random
    model.generation_config.pad_token_id = 0
    return model


def example(model: Any, batch: int, visual: int, text: int) -> dict[str, Tensor]:
    """Inputs of ``batch`` equal-length prompts without padding: one picture of ``visual`` tokens, ``text`` others.

    A third of the text stands before the picture, as in chat templates, and one token of it before each tile of the
    picture, where real processors write the tile's place.

    Args:
        model: What `build` made.
        batch: How many prompts.
        visual: Visual tokens of each prompt, after the merger.
        text: All other tokens of each prompt.

    Raises:
        UserError: the model's geometry does not allow that many visual tokens.
    """
    if visual < 1 or text < 1:
        raise UserError(f"visual={visual} text={text}: give 1 or more of each")
    pixels, kinds = _pixels(model.config, batch, visual), {}
    tiles = pixels["pixel_values"].shape[1] if pixels["pixel_values"].ndim == 5 else 1
    if text <= tiles:
        raise UserError(f"text={text}: {tiles} tiles need a token before each; give {tiles + 1} or more")
    token, generator = model.config.image_token_id, torch.Generator().manual_seed(1)
    words = torch.randint(40, 90, (batch, text - tiles), generator=generator)  # below every special token
    before = (text - tiles) // 3
    tile = torch.full((tiles, 1 + visual // tiles), token)
    tile[:, 0] = torch.arange(5, 5 + tiles)
    ids = torch.cat([words[:, :before], tile.flatten().expand(batch, -1), words[:, before:]], 1)
    if "image_grid_thw" in pixels:
        kinds["mm_token_type_ids"] = (ids == token).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds, **pixels}
    moved = {name: x.to(model.device) for name, x in inputs.items()}
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in moved.items()}


def _pixels(config: Any, batch: int, visual: int) -> dict[str, Tensor]:
    """Noise in the place of pictures, in the layout of the family's processor."""
    vision, generator = config.vision_config, torch.Generator().manual_seed(2)
    if config.model_type.startswith("qwen"):  # any size: flat patches of two frames, 2 x 2 of them a token
        rows = max(d for d in range(1, math.isqrt(visual) + 1) if visual % d == 0)
        merge = vision.spatial_merge_size
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = torch.randn(batch * visual * merge**2, size, generator=generator)
        grid = torch.tensor([[1, rows * merge, visual // rows * merge]] * batch)
        return {"pixel_values": patches, "image_grid_thw": grid}
    tiled = hasattr(config, "scale_factor")
    each = (vision.image_size // vision.patch_size // (config.scale_factor if tiled else 1)) ** 2
    count, rest = divmod(visual, each)
    if rest or (count > 1 and not tiled):
        more = f"a multiple of {each} (tiles)" if tiled else f"{each}"
        raise UserError(f"visual={visual}: a picture has {each} tokens in this shape; give {more}")
    shape = (3, vision.image_size, vision.image_size)
    pixels = torch.randn(batch * count, *shape, generator=generator)
    return {"pixel_values": pixels.view(batch, count, *shape) if tiled else pixels}
