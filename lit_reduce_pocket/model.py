"""Builds pocket: a LLaVA of LLaVA-1.5's geometry (CLIP tower, 576 tokens, MLP projector, Llama) that fits a laptop."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lit_reduce_pocket.attention import attending
from lit_reduce_pocket.words import vocabulary
from lit_reduce_pocket.world import GRID, PATCH, SIZE

TEMPLATE = (
    "<s>{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{% if m.role == 'user' %} answer :{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a word-piece tokenizer: known words whole, numbers by digit, unknown words by letter."""
    vocab = {piece: i for i, piece in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="[PAD]", unk_token="[UNK]",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip


def build_processor() -> LlavaProcessor:
    """Returns the processor: 336-pixel pictures, 576 placeholders each, a one-turn chat template."""
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=pictures, tokenizer=build_tokenizer(), patch_size=PATCH, image_token="<image>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """Returns an untrained pocket: 7.9 M parameters, float32."""
    torch.manual_seed(seed)
    pieces = vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, image_size=SIZE,
        patch_size=PATCH, hidden_act="gelu_pytorch_tanh", projection_dim=192,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(pieces), hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
        bos_token_id=pieces.index("<s>"),
        eos_token_id=pieces.index("</s>"), pad_token_id=pieces.index("[PAD]"),
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=pieces.index("<image>"), vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=(SIZE // PATCH) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    _initialise(model)
    model.generation_config.max_new_tokens = 24
    return model


def _initialise(model: LlavaForConditionalGeneration) -> None:
    """Starts where attention can tell places and words apart; the library's defaults are made for far larger widths."""
    tower = vision_tower(model)
    width = tower.embeddings.position_embedding.weight.shape[1]
    with torch.no_grad():
        tower.embeddings.position_embedding.weight[1:] = 0.5 * sincos(GRID, width)
        for block in tower.encoder.layers:
            for proj in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                torch.nn.init.normal_(proj.weight, std=width**-0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.06)
    for layer in model.get_decoder().layers:
        # Like attends to like (equal queries and keys) and copies what it finds (output undoes value): the circuit
        # that binds "the red circle" to its patch is there in outline from the first step on.
        attention = layer.self_attn
        torch.nn.init.normal_(attention.q_proj.weight, std=0.06)
        attention.k_proj.weight.data.copy_(attention.q_proj.weight.data)
        torch.nn.init.orthogonal_(attention.v_proj.weight, gain=0.3)
        attention.o_proj.weight.data.copy_(attention.v_proj.weight.data.T)


def sincos(grid: int, width: int) -> Tensor:
    """Returns sines and cosines of rows and columns, [grid * grid, width]."""
    rate = 1.0 / (100.0 ** (torch.arange(width // 4) / (width // 4)))
    angle = torch.arange(grid)[:, None] * rate
    line = torch.cat([angle.sin(), angle.cos()], 1)
    rows, cols = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    return torch.cat([rows, cols], -1).flatten(0, 1)


def patches_of(pixels: Tensor) -> Tensor:
    """Cuts normalised pictures [B, 3, 336, 336] into patches [B, 576, 588], in the order of the tower's weights."""
    b, c, h, w = pixels.shape
    rows, cols = h // PATCH, w // PATCH
    cut = pixels.reshape(b, c, rows, PATCH, cols, PATCH).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(b, rows * cols, c * PATCH * PATCH)


def tower_forward(model: LlavaForConditionalGeneration, patches: Tensor, positions: Tensor) -> Tensor:
    """Runs the tower on any subset of patches.

    Args:
        model: Pocket.
        patches: [B, P, 588].
        positions: [B, P] raster indices into the 24 x 24 grid.

    Returns:
        [B, 1 + P, 192], CLS first; equal to the tower's last hidden state when all 576 patches are given in order.
    """
    tower = vision_tower(model)
    stem = tower.embeddings
    seen = patches @ stem.patch_embedding.weight.flatten(1).T.to(patches.dtype)
    seen = seen + stem.position_embedding.weight[positions + 1]
    first = (stem.class_embedding + stem.position_embedding.weight[0]).expand(len(patches), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([first, seen], 1))
    with attending(model.config.vision_config):
        last: Tensor = tower.encoder(inputs_embeds=hidden).last_hidden_state
    return last


def vision_tower(model: LlavaForConditionalGeneration) -> Any:
    """Returns the module that holds embeddings, pre_layrnorm and encoder of the CLIP tower."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def normalise(pictures: Tensor) -> Tensor:
    """Maps uint8 pictures [B, 336, 336, 3] to normalised pixels [B, 3, 336, 336], as the processor does."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=pictures.device)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=pictures.device)
    return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)
