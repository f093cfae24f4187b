"""Stand-ins of the two parts, small enough for unit tests: a byte tokenizer, a Llama, a DINOv2, photographs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>")


def byte_tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="<|im_end|>", pad_token="<|im_end|>")


def shaken(model: Any) -> Any:
    """Weights large enough that every one of them shows."""
    g = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        weight.data += torch.randn(weight.shape, generator=g) * (0.15 if weight.ndim > 1 else 0.05)
    return model.eval()


@pytest.fixture
def language() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=264, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return shaken(LlamaForCausalLM(config))


@pytest.fixture
def tower() -> Dinov2Model:
    config = Dinov2Config(hidden_size=12, num_hidden_layers=12, num_attention_heads=2, mlp_ratio=2, image_size=56)
    return shaken(Dinov2Model(config))


@pytest.fixture
def flickr8k(tmp_path: Path) -> Path:
    """Twelve photographs of one colour each, and what is said about them."""
    folder = tmp_path / "data" / "flickr8k"
    (folder / "images").mkdir(parents=True)
    colours = ["red", "green", "blue", "white"]
    lines, pairs = ["image,caption"], []
    for i in range(12):
        name = f"{i}.jpg"
        shade = np.full((56, 56, 3), np.eye(4, 3)[i % 4] * 200 + 20, np.uint8)
        Image.fromarray(shade).save(folder / "images" / name)
        lines += [f'{name},"a {colours[i % 4]} dog {k} ."' for k in range(5)]
        pairs += [f"{name}\ta {colours[i % 4]} dog 0 .\tmatch", f"{name}\ta {colours[(i + 1) % 4]} cat {i} .\tno-match"]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    for part, some in (("Train", pairs[::2]), ("Dev", pairs[1::4]), ("Test", pairs[3::4])):
        (folder / f"flickr8k.{part}Images.txt").write_text("\n".join(some) + "\n")
    return folder
