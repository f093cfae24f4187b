"""The tokenizer, the template and the shortcuts of training agree with what plain transformers does at inference."""

import numpy as np
import pytest
import torch

from lit_reduce_pocket.model import (
    TEMPLATE,
    build_model,
    build_processor,
    build_tokenizer,
    normalise,
    patches_of,
    tower_forward,
    vision_tower,
)
from lit_reduce_pocket.questions import questions
from lit_reduce_pocket.render import render
from lit_reduce_pocket.turns import BOS, EOS, token_ids
from lit_reduce_pocket.words import vocabulary
from lit_reduce_pocket.world import GRID, make_scene


@pytest.fixture(scope="module")
def model():
    return build_model(0).eval()


def test_token_ids_are_those_of_the_tokenizer_and_decode_to_the_text() -> None:
    tokenizer = build_tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, 0)
    texts = [
        "47",
        "8",
        "what number is on the red circle ?",
        "is there a zebra ?",
        "describe it.",
        "a small dog's tail",
    ]
    texts += [text for i in range(15) for q in questions(make_scene("train", i), 16) for text in (q.prompt, q.answer)]
    for text in texts[:4] + texts[6:]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert token_ids(text) == ids
        assert tokenizer.decode(ids).replace(" ?", "?") == text.replace(" ?", "?").replace(" .", ".")
    assert tokenizer.decode(token_ids("47")) == "47"
    assert tokenizer.decode(token_ids("a small red star with number 47")) == "a small red star with number 47"
    assert tokenizer.unk_token_id in tokenizer("é", add_special_tokens=False).input_ids


def test_the_template_lays_a_prompt_out_as_training_does() -> None:
    processor, scene = build_processor(), make_scene("val", 0)
    prompt = "what number is on the red circle ?"
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    picture = render(scene)
    inputs = processor(text=text, images=[picture], return_tensors="pt", add_special_tokens=False)
    image = vocabulary().index("<image>")
    assert inputs["input_ids"][0].tolist() == [BOS, *[image] * GRID**2, *token_ids(f"{prompt} answer :")]
    ours = normalise(torch.from_numpy(np.asarray(picture).copy())[None])
    torch.testing.assert_close(ours, inputs["pixel_values"], atol=1e-4, rtol=0)
    assert processor.chat_template == TEMPLATE


def test_the_tower_on_all_patches_is_the_library_tower(model) -> None:
    pixels = normalise(torch.from_numpy(np.asarray(render(make_scene("val", 1))).copy())[None])
    with torch.no_grad():
        positions = torch.arange(GRID**2)[None]
        ours = tower_forward(model, patches_of(pixels), positions)
        library = model.model.vision_tower(pixels)
        torch.testing.assert_close(ours, library.last_hidden_state, atol=1e-4, rtol=0)
        # A window equals the library's blocks on those patches: each knows its place.
        some = torch.tensor([[30, 31, 400]])
        seen = vision_tower(model).embeddings(pixels)[:, [0, 31, 32, 401]]
        window = vision_tower(model).encoder(inputs_embeds=vision_tower(model).pre_layrnorm(seen)).last_hidden_state
        part = tower_forward(model, patches_of(pixels)[:, some[0]], some)
        torch.testing.assert_close(part, window, atol=1e-4, rtol=0)


def test_its_size_and_geometry(model) -> None:
    assert sum(p.numel() for p in model.parameters()) <= 14e6
    assert len(model.get_decoder().layers) >= 6
    assert model.config.image_seq_length == 576
    assert model.get_input_embeddings().weight is model.lm_head.weight
    again = build_model(0).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())
    assert not torch.equal(build_model(1).lm_head.weight, model.lm_head.weight)
