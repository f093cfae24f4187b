"""A LLaVA small enough for a unit test, with a real processor, built without any download."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
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

from lit_reduce.backbones import Backbone, wrap

SIZE, PATCH, WORDS = 24, 4, 96
TEMPLATE = (
    "<s>{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% else %} {{ part.text }}{% endif %}{% endfor %} answer{% endfor %}"
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Backbone:
    """36 visual tokens an image (6 x 6), a CLIP tower with CLS, a Llama of five layers, float32, frozen."""
    return wrap(build_model(), build_processor())


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same backbone as a folder, for what loads one by name."""
    folder = tmp_path_factory.mktemp("backbone")
    build_model().save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Three pictures that differ."""
    g = torch.Generator().manual_seed(3)
    return [Image.fromarray(torch.randint(0, 256, (SIZE, SIZE, 3), generator=g).byte().numpy()) for _ in range(3)]


@pytest.fixture
def batch(tiny: Backbone, pictures: list[Image.Image]) -> dict[str, Any]:
    """Two prompts of unequal length, padded on the left; the first with two pictures."""
    return tiny.prepare([pictures[:2], pictures[2]], ["what is the red w30 here ?", "is big ?"])


def vocabulary() -> dict[str, int]:
    words = ["[PAD]", "<s>", "</s>", "<image>", "[UNK]", "answer", "what", "is", "the", "red", "big", "here", "?"]
    words += [f"w{i}" for i in range(WORDS - len(words))]
    return {word: i for i, word in enumerate(words)}


def build_processor() -> LlavaProcessor:
    tokenizer = Tokenizer(WordLevel(vocabulary(), unk_token="[UNK]"))
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


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """Weights of std 0.25: with the usual 0.02 attention is almost uniform, and no test notices what is hidden."""
    words = vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=SIZE,
        patch_size=PATCH, projection_dim=24,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=words["<image>"], image_seq_length=36)
    model = LlavaForConditionalGeneration(config)
    g = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.25, generator=g)
        elif "bias" in name or "class_embedding" in name:
            weight.data.normal_(0, 0.05, generator=g)
    model.generation_config.eos_token_id = None  # every test sees as many steps as it asks for
    model.generation_config.pad_token_id = 0
    return model.eval()
