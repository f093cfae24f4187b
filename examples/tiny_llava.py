"""A LLaVA with random weights, made offline: 36 visual tokens for an image, and answers without meaning."""

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SIZE, PATCH = 24, 4
SPECIAL = ["[PAD]", "<s>", "</s>", "[UNK]", "<image>"]
WORDS = [*SPECIAL, "USER:", "ASSISTANT:", "what", "is", "on", "the", "left", "right", "?"]
TEMPLATE = (
    "{% for m in messages %}USER: {% for part in m.content %}{% if part.type == 'image' %}<image> {% else %}"
    "{{ part.text }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
)


def model() -> LlavaForConditionalGeneration:
    """A CLIP tower of four blocks and a Llama of four layers, float32, in evaluation mode."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=SIZE,
        patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=WORDS.index("<image>"))
    return LlavaForConditionalGeneration(config).eval()


def processor() -> LlavaProcessor:
    """Its processor: one word is one token."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="[PAD]", unk_token="[UNK]",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        image_processor=images, tokenizer=fast, patch_size=PATCH, image_token="<image>", chat_template=TEMPLATE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
