"""Builds pocket: a LLaVA of LLaVA-1.5's geometry (CLIP tower, 576 tokens, MLP projector, Llama) that fits a laptop."""

from __future__ import annotations

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

from lit_reduce.pocket.words import vocabulary
from lit_reduce.pocket.world import PATCH, SIZE

TEMPLATE = (
    "<s>{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{% if m.role == 'user' %} answer :{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a word-piece tokenizer: known words whole, numbers by digit, unknown words by letter."""
    vocab = {piece: i for i, piece in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))  # noqa: S106 (a token of text, not a secret)
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
        image_processor=pictures, tokenizer=build_tokenizer(), patch_size=PATCH, image_token="<image>",  # noqa: S106
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
        vocab_size=len(pieces), hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=pieces.index("<s>"),
        eos_token_id=pieces.index("</s>"), pad_token_id=pieces.index("[PAD]"),
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=pieces.index("<image>"), vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=(SIZE // PATCH) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 24
    return model


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
    return tower.encoder(inputs_embeds=hidden).last_hidden_state


def vision_tower(model: LlavaForConditionalGeneration) -> torch.nn.Module:
    """Returns the module that holds embeddings, pre_layrnorm and encoder of the CLIP tower."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def normalise(pictures: Tensor) -> Tensor:
    """Maps uint8 pictures [B, 336, 336, 3] to normalised pixels [B, 3, 336, 336], as the processor does."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)
