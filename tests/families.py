"""A tiny random model of every family, with one batch: two prompts padded on the left, two images against one.

``from families import FAMILIES, build`` (pytest puts tests/ on the path). Float32, weights of std 0.25: with the usual
0.02 attention is almost uniform, and no test notices what is hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

IMAGE, VIDEO, PAD, GLOBAL = 100, 101, 0, 99
Pictures = dict[str, Tensor]

TEXT = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 24, "patch_size": 4}
SIGLIP = VISION | {"num_hidden_layers": 4, "vision_use_head": False}
ROPE = {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
TILES = [[24, 48], [48, 24], [48, 48]]  # sizes that LLaVA-NeXT and -OneVision may cut into tiles of 24 x 24
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}


@dataclass(frozen=True)
class Tiny:
    """A model and the inputs of one batch.

    Attributes:
        model: Random, float32, evaluating, without an end-of-text token, so that every test sees all its steps.
        inputs: ``input_ids``, ``attention_mask`` ``[2, L]`` and what the vision tower reads; make a copy to change it.
        token: The placeholder of a visual token.
    """

    model: Any
    inputs: dict[str, Any]
    token: int = IMAGE


def _llava() -> tuple[Any, Pictures]:
    vision = hf.CLIPVisionConfig(**VISION, num_hidden_layers=4)
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE)
    return hf.LlavaForConditionalGeneration(config), {"pixel_values": torch.randn(3, 3, 24, 24)}


def _tiles() -> Pictures:
    sizes = torch.tensor([[40, 44], [48, 48], [30, 48]])
    return {"pixel_values": torch.randn(3, 5, 3, 24, 24), "image_sizes": sizes}


def _llava_next() -> tuple[Any, Pictures]:
    vision = hf.CLIPVisionConfig(**VISION, num_hidden_layers=4)
    config = hf.LlavaNextConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, image_grid_pinpoints=TILES
    )
    return hf.LlavaNextForConditionalGeneration(config), _tiles()


def _onevision() -> Any:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP), text_config=hf.Qwen2Config(**TEXT), **TOKENS,
        image_grid_pinpoints=TILES,
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _llava_onevision() -> tuple[Any, Pictures]:
    return _onevision(), _tiles()


def _llava_onevision_video() -> tuple[Any, Pictures]:
    return _onevision(), {"pixel_values_videos": torch.randn(2, 3, 3, 24, 24)}


def _patches(name: str, sizes: list[list[int]]) -> Pictures:
    """Flat patches of 4 x 4 pixels and two frames, as Qwen's processors make them."""
    thw = torch.tensor(sizes)
    return {name: torch.randn(int(thw.prod(1).sum()), 3 * 2 * 4 * 4)}


SIZES = [[1, 6, 8], [1, 4, 6], [1, 8, 4]]
VIDEOS = [[3, 4, 6], [2, 4, 4]]


def _qwen2_vl() -> tuple[Any, Pictures]:
    vision = {"depth": 3, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    config = hf.Qwen2VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=vision, **TOKENS)
    return hf.Qwen2VLForConditionalGeneration(config), _patches("pixel_values", SIZES) | {
        "image_grid_thw": torch.tensor(SIZES)
    }


def _qwen25() -> Any:
    vision = {
        "depth": 3, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_heads": 2,
        "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [2],
    }  # fmt: skip
    config = hf.Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=vision, **TOKENS)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen2_5_vl() -> tuple[Any, Pictures]:
    return _qwen25(), _patches("pixel_values", SIZES) | {"image_grid_thw": torch.tensor(SIZES)}


def _qwen2_5_vl_video() -> tuple[Any, Pictures]:
    thw = {"video_grid_thw": torch.tensor(VIDEOS), "second_per_grid_ts": torch.tensor([1.0, 2.0])}
    return _qwen25(), _patches("pixel_values_videos", VIDEOS) | thw


def _qwen3_vl() -> tuple[Any, Pictures]:
    vision = {
        "depth": 4, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_heads": 2,
        "patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2],
    }  # fmt: skip
    rope = ROPE | {"mrope_interleaved": True}
    config = hf.Qwen3VLConfig(
        text_config=TEXT | {"head_dim": 8, "rope_parameters": rope}, vision_config=vision, **TOKENS
    )
    return hf.Qwen3VLForConditionalGeneration(config), _patches("pixel_values", SIZES) | {
        "image_grid_thw": torch.tensor(SIZES)
    }


def _shuffled() -> Pictures:
    pixels = torch.randn(2, 2, 3, 24, 24)
    pixels[1, 1] = 0  # the second prompt has one image; transformers pads with zeros
    return {"pixel_values": pixels}


def _smolvlm() -> tuple[Any, Pictures]:
    config = hf.SmolVLMConfig(
        vision_config=VISION | {"num_hidden_layers": 3}, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE,
        scale_factor=2, pad_token_id=PAD,
    )  # fmt: skip
    return hf.SmolVLMForConditionalGeneration(config), _shuffled()


def _idefics3() -> tuple[Any, Pictures]:
    config = hf.Idefics3Config(
        vision_config=VISION | {"num_hidden_layers": 3}, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE,
        scale_factor=2, pad_token_id=PAD,
    )  # fmt: skip
    return hf.Idefics3ForConditionalGeneration(config), _shuffled()


def _internvl() -> tuple[Any, Pictures]:
    vision = VISION | {"num_hidden_layers": 3, "image_size": [24, 24], "patch_size": [4, 4]}
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=9
    )
    return hf.InternVLForConditionalGeneration(config), {"pixel_values": torch.randn(3, 3, 24, 24)}


def _paligemma() -> tuple[Any, Pictures]:
    config = hf.PaliGemmaConfig(
        vision_config=SIGLIP | {"projection_dim": 32}, projection_dim=32, hidden_size=32, image_token_index=IMAGE,
        text_config={"model_type": "gemma", **TEXT, "head_dim": 8}, vocab_size=TEXT["vocab_size"],
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config), {"pixel_values": torch.randn(3, 3, 24, 24)}


def _gemma3() -> tuple[Any, Pictures]:
    kinds = ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2
    text = TEXT | {"head_dim": 8, "sliding_window": 12, "layer_types": kinds, "query_pre_attn_scalar": 8}
    config = hf.Gemma3Config(
        vision_config=SIGLIP, text_config=text, mm_tokens_per_image=9, image_token_index=IMAGE, boi_token_index=102,
        eoi_token_index=103,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config), {"pixel_values": torch.randn(3, 3, 24, 24)}


def _mistral3() -> tuple[Any, Pictures]:
    vision = VISION | {"model_type": "pixtral", "num_hidden_layers": 3, "image_size": 32, "head_dim": 12}
    text = {"model_type": "mistral", **TEXT, "head_dim": 8, "sliding_window": None}
    config = hf.Mistral3Config(vision_config=vision, text_config=text, image_token_index=IMAGE)
    sizes = torch.tensor([[24, 32], [16, 24], [32, 16]])
    return hf.Mistral3ForConditionalGeneration(config), {
        "pixel_values": torch.randn(3, 3, 32, 32), "image_sizes": sizes,
    }  # fmt: skip


FAMILIES: dict[str, Callable[[], tuple[Any, Pictures]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "mistral3": _mistral3,
}
VIDEO_FAMILIES: dict[str, Callable[[], tuple[Any, Pictures]]] = {
    "llava_onevision_video": _llava_onevision_video,
    "qwen2_5_vl_video": _qwen2_5_vl_video,
}


def build(name: str, attention: str = "sdpa", seed: int = 0) -> Tiny:
    """A fresh model of a family and its batch; equal for equal arguments. Videos: one for each prompt."""
    torch.manual_seed(seed)
    model, pictures = (FAMILIES | VIDEO_FAMILIES)[name]()
    initialise(model)
    model.set_attn_implementation(attention)
    token = VIDEO if "video" in name else IMAGE
    counts = _counts(model, pictures, token)
    text = torch.Generator().manual_seed(seed + 1)

    def words(count: int) -> list[int]:
        return torch.randint(5, 90, (count,), generator=text).tolist()

    rows = [words(3), words(2)]
    announced = model.config.model_type in ("idefics3", "smolvlm")  # whose processors tell tiles apart by a token
    for row, images in zip(rows, counts, strict=True):
        for count in images:
            row += [GLOBAL] * announced + [token] * count + words(2)
    rows[0] += words(4)
    rows[1] += words(1)
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, **pictures}
    return Tiny(model, inputs | _kinds(model, ids, token), token)


def one(tiny: Tiny, row: int = 0) -> dict[str, Any]:
    """The inputs of one prompt alone, without padding, for what takes a single row (or to compare with the batch)."""
    real = tiny.inputs["attention_mask"][row].bool()
    images = (tiny.inputs["input_ids"] == tiny.token).diff(dim=1, prepend=torch.zeros(2, 1, dtype=torch.bool))
    first = (images & (tiny.inputs["input_ids"] == tiny.token)).sum(1).tolist()
    mine = slice(first[0], None) if row else slice(0, first[0])
    out: dict[str, Any] = {}
    for name, x in tiny.inputs.items():
        if name in ("input_ids", "attention_mask") or name.endswith("token_type_ids"):
            out[name] = x[row : row + 1, real]
        elif (
            name in ("pixel_values", "pixel_values_videos") and x.ndim == 2
        ):  # patches of all images behind one another
            thw = tiny.inputs["video_grid_thw" if "videos" in name else "image_grid_thw"].prod(1).tolist()
            out[name] = torch.cat(torch.split(x, thw)[mine])
        elif len(x) == 2 and sum(first) == 3:  # one entry a prompt: Idefics3 and SmolVLM
            out[name] = x[row : row + 1, : first[row]]
        else:
            out[name] = x[mine]
    return out


def initialise(model: Any) -> None:
    """Weights that make attention uneven; no end-of-text token."""
    g = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.25, generator=g)
        elif "bias" in name or "class_embedding" in name or "newline" in name:
            weight.data.normal_(0, 0.05, generator=g)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD


@torch.no_grad()
def _counts(model: Any, pictures: Pictures, token: int) -> list[list[int]]:
    """Visual tokens of each image of either prompt."""
    read = model.base_model.get_video_features if token == VIDEO else model.base_model.get_image_features
    clips = {name: x for name, x in pictures.items() if name != "second_per_grid_ts"}
    features = read(**clips, return_dict=True).pooler_output
    n = [len(x) for x in features]
    if token == VIDEO:
        return [[n[0]], [n[1]]]
    if len(n) == 2:  # Idefics3 and SmolVLM report each prompt's images as one
        return [[n[0] // 2] * 2, [n[1]]]
    return [[n[0], n[1]], [n[2]]]


def _kinds(model: Any, ids: Tensor, token: int) -> dict[str, Tensor]:
    """What some processors say about each token: which are visual; for PaliGemma, which are the prefix (0)."""
    kind = model.config.model_type
    if kind.startswith("qwen"):
        return {"mm_token_type_ids": (ids == token).long() * (2 if token == VIDEO else 1)}
    if kind == "gemma3":
        return {"token_type_ids": (ids == token).long()}
    return {"token_type_ids": torch.zeros_like(ids)} if kind == "paligemma" else {}
