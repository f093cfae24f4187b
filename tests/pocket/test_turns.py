"""Packed turns: each sees the picture and itself, as if it were alone."""

import math

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lit_reduce_pocket.guidance import misses
from lit_reduce_pocket.language import symbolic_batch
from lit_reduce_pocket.questions import questions
from lit_reduce_pocket.render import owners
from lit_reduce_pocket.turns import BOS, EOS, answer_logits, pack, token_ids
from lit_reduce_pocket.words import vocabulary
from lit_reduce_pocket.world import GRID, PATCH, make_scene

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


def test_counted_things_are_looked_at_once_each_beside_the_start_token() -> None:
    batch = symbolic_batch(2, 4, turns=14)
    counts = 0
    for scene, things in enumerate(make_scene("train", 8 + i) for i in range(4)):
        asked = questions(things, 14)
        for j, question in enumerate(asked):
            rows = batch["look"][scene][batch["turn"][scene] == j]
            if question.prompt.startswith("how many"):
                counts += 1
                assert (rows.sum(-1) == 1 + int(question.answer)).all()
            tally = batch["tally"][scene][batch["turn"][scene] == j]
            assert (tally == (int(question.answer) if question.prompt.startswith("how many") else -1)).all()
            assert (rows[:, 0] == (question.family in ("count", "presence") or "how many" in question.prompt)).all()
    assert counts > 3


def test_compared_things_are_found_where_their_names_end() -> None:
    batch = symbolic_batch(2, 4, turns=14)
    relations = 0
    for scene, things in enumerate(make_scene("train", 8 + i) for i in range(4)):
        for j, question in enumerate(questions(things, 14)):
            ends = batch["compared"][scene][batch["turn"][scene] == j]
            if question.family != "relation":
                assert (ends == -1).all()
                continue
            relations += 1
            for end, thing in zip(ends[0].tolist(), question.about, strict=True):
                assert batch["ids"][scene][end - 1 : end + 1].tolist() == token_ids(f"{thing.color} {thing.shape}")
                cell = int(thing.y // PATCH) * GRID + int(thing.x // PATCH)
                shown = batch["where"][scene][batch["named"][scene][end]]
                assert set(shown.tolist()) <= {cell}
                spot = batch["spot"][scene][end]
                assert spot.tolist() == pytest.approx([thing.x / 168 - 1, thing.y / 168 - 1], abs=1e-5)
    assert relations > 3


def test_misses_is_the_divergence_of_each_row_that_has_a_goal() -> None:
    logp = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    goal = torch.tensor([[[True, False, True, False], [False] * 4, [False, False, False, True]]])
    by_hand = [sum(0.5 * (math.log(0.5) - float(logp[0, 0, i])) for i in (0, 2)), -float(logp[0, 2, 3])]
    assert float(misses(logp, goal)) == pytest.approx(sum(by_hand) / 2, abs=1e-6)
