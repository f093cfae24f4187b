"""Packed turns: each sees the picture and itself, as if it were alone."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lit_reduce.pocket.language import answer_logits
from lit_reduce.pocket.turns import BOS, EOS, pack, token_ids
from lit_reduce.pocket.words import vocabulary
from lit_reduce.pocket.world import GRID

TURNS = [("what color is the star ?", "red"), ("describe the cross .", "a small red cross with number 47"), ("a", "no")]


@pytest.fixture(scope="module")
def small():
    """A decoder with pocket's words and weights large enough to tell what attention sees."""
    text = LlamaConfig(
        vocab_size=len(vocabulary()), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=4))
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.25, generator=generator)
    return model.eval()


def packed(turns, length: int = 40) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v)[None] for k, v in pack(turns, length).items()}


def test_pack_lays_out_turns() -> None:
    out = pack([TURNS[0], ("no", "7")], 30)
    question, reply = token_ids("what color is the star ? answer :"), token_ids("red")
    n = len(question) + len(reply)
    assert out["ids"][:n].tolist() == question + reply
    assert out["targets"][:n].tolist() == [-100] * (len(question) - 1) + [*reply, EOS]
    assert out["turn"].tolist() == [0] * n + [1] * 4 + [-1] * (30 - n - 4)
    assert out["place"][: n + 4].tolist() == [*range(n), *range(4)]
    assert pack(TURNS, 12)["turn"].max() == 0  # what does not fit is left out whole
    assert (pack(TURNS, 3)["turn"] == -1).all()


def test_packed_turns_equal_each_turn_alone_in_a_plain_model(small) -> None:
    generator = torch.Generator().manual_seed(1)
    where = torch.tensor([[3, 50, 51, 300, 575, 0, 0]])
    valid = torch.tensor([[True, True, True, True, True, False, False]])
    visual = torch.randn(1, 7, 32, generator=generator)
    with torch.no_grad():
        logits, targets = answer_logits(small, visual, where, valid, packed(TURNS))
        expected = []
        for prompt, answer in TURNS:  # no packing, no mask of ours, no invalid patches
            question, reply = token_ids(f"{prompt} answer :"), [*token_ids(answer), EOS]
            ids = torch.tensor([question + reply])[:, :-1]
            words = small.get_input_embeddings()
            embeds = torch.cat([words(torch.tensor([[BOS]])), visual[:, :5], words(ids)], 1)
            places = torch.cat([torch.tensor([0]), 1 + where[0, :5], 1 + GRID**2 + torch.arange(ids.shape[1])])[None]
            out = small.get_decoder()(
                inputs_embeds=embeds, attention_mask=torch.ones_like(places), position_ids=places, use_cache=False
            )
            expected.append(small.lm_head(out.last_hidden_state[0, -len(reply) :]))
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=0)
    assert targets.tolist() == [t for _, answer in TURNS for t in (*token_ids(answer), EOS)]
    assert (logits[1:] - logits[:-1]).abs().max() > 1  # the comparison has something to see


def test_a_batch_of_packed_rows_equals_the_rows(small) -> None:
    generator = torch.Generator().manual_seed(2)
    visual, where = torch.randn(2, 4, 32, generator=generator), torch.tensor([[1, 9, 70, 71], [0, 5, 200, 0]])
    valid = torch.tensor([[True] * 4, [True, True, True, False]])
    rows = [packed(TURNS), packed(TURNS[::-1])]
    both = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
    with torch.no_grad():
        together, _ = answer_logits(small, visual, where, valid, both)
        alone = [
            answer_logits(small, visual[i : i + 1], where[i : i + 1], valid[i : i + 1], rows[i])[0] for i in (0, 1)
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_symbolic_scenes_look_at_what_decides() -> None:
    from lit_reduce.pocket.language import symbolic_batch
    from lit_reduce.pocket.render import owners
    from lit_reduce.pocket.world import make_scene

    batch = symbolic_batch(2, 2, turns=6)
    assert batch["look"].any()
    for i in range(2):
        scene = make_scene("train", 4 + i)
        shown = np.stack(owners(scene)).reshape(3, -1)
        assert not batch["look"][i][:, 1:][:, ~batch["valid"][i]].any()
        assert not batch["look"][i][batch["turn"][i] < 0].any()
        for row in batch["look"][i][batch["turn"][i] >= 0][:, 1:]:
            cells = batch["where"][i][row].numpy()
            assert (shown[:, cells] >= 0).any(0).all()  # never at the background
