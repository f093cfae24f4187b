"""The teacher: many questions at once say what each would say alone, and what lies on disk is what was computed."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_reduce.backbones import Backbone
from lit_reduce.data.groups import Group, group_rows
from lit_reduce.data.jsonl import Row
from lit_reduce.distill.teacher import TOP, Teacher


def alone(tiny: Backbone, picture: Image.Image, prompt: str, answer: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits and attentions [layers, L, L] of one question and its answer in the plain model, with eager attention."""
    inputs = tiny.prepare([picture], [prompt])
    reply = tiny.processor.tokenizer(answer, add_special_tokens=False).input_ids
    asked = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([[*reply, tiny.processor.tokenizer.eos_token_id]])], 1)
    language = tiny.model.model.language_model
    before = language.config._attn_implementation
    tiny.model.set_attn_implementation("eager")
    out = tiny.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"], output_attentions=True
    )
    tiny.model.set_attn_implementation(before)
    return out.logits[0].detach(), torch.stack(out.attentions)[:, 0].mean(1).detach(), asked


@pytest.mark.parametrize("rows", ["text", "answer"])
def test_packed_turns_equal_each_turn_alone(tiny: Backbone, groups: list[Group], rows: str) -> None:
    layers = [1, 3]
    for group in groups[:2]:
        out = Teacher(tiny, layers, rows).outputs(group)
        picture, image = group.open(), tiny.model.config.image_token_id
        starts = [0, *out["lengths"].sum(1).cumsum(0).tolist()]
        at = 0
        for turn, (prompt, answer) in enumerate(group.turns):
            logits, attention, asked = alone(tiny, picture, prompt, answer)
            whole = tiny.prepare([picture], [prompt])["input_ids"][0].tolist()
            question, reply = out["lengths"][turn].tolist()
            ids = out["prefix"].tolist() + out["suffix"][starts[turn] : starts[turn + 1]].tolist()
            assert ids[:asked] == whole
            assert (len(ids) - asked, asked) == (reply, len(out["prefix"]) + question)
            expected = logits[asked - 1 : -1].log_softmax(-1)
            assert len(expected) == reply
            top, top_ids = out["top"][at : at + reply], out["top_ids"][at : at + reply].long()
            assert top.shape == (reply, TOP)
            # Stored in half precision.
            torch.testing.assert_close(top.float(), expected.gather(1, top_ids), atol=1e-2, rtol=0)
            torch.testing.assert_close(top.float(), expected.topk(TOP).values, atol=1e-2, rtol=0)
            at += reply
            visual = torch.tensor([i == image for i in whole] + [False] * reply)
            first = len(out["prefix"]) if rows == "text" else asked - 1
            last = len(ids) - 1 if rows == "answer" else len(ids)
            guide = attention[layers][:, first:last][:, :, visual].mean(0).sum(0)
            torch.testing.assert_close(out["guide"][turn].float(), guide / guide.sum(), atol=1e-3, rtol=1e-2)
            assert float(out["guide"][turn].float().sum()) == pytest.approx(1, abs=3e-3)
        assert at == len(out["top"])
        assert (out["guide"][0] - out["guide"][1]).abs().max() > 0.01  # questions look at different things


def test_features_are_what_the_decoder_gets(tiny: Backbone, teacher: Teacher, groups: list[Group]) -> None:
    out = teacher.outputs(groups[0])
    pixels = tiny.prepare([groups[0].open()], ["what ?"])["pixel_values"]
    features = tiny.model.get_image_features(pixels).pooler_output[0]
    torch.testing.assert_close(out["features"].float(), features, atol=5e-3, rtol=1e-2)
    assert out["grid"].tolist() == [1, 6, 6]


def test_its_own_answer_takes_the_place_of_a_missing_one(tiny: Backbone, teacher: Teacher, groups: list[Group]) -> None:
    tiny.model.generation_config.max_new_tokens = None
    group = Group("own", groups[0].open, (("what ?", None), ("is big ?", "w50")))
    out = teacher.outputs(group)
    inputs = tiny.prepare([group.open()], ["what ?"])
    said = tiny.model.generate(**inputs, do_sample=False, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
    assert 2 not in said  # it does not end within 32 tokens, and no end is made up for it
    question, reply = out["lengths"][0].tolist()
    assert out["suffix"][question : question + reply].tolist() == said.tolist()
    assert out["top_ids"][:reply, 0].tolist() == said.tolist()  # greedy: the most likely word each time
    assert out["lengths"][1, 1] == 2


def test_the_cache_gives_what_was_computed(tiny: Backbone, groups: list[Group], tmp_path: Path) -> None:
    plain = Teacher(tiny, [2]).outputs(groups[0])
    cached = Teacher(tiny, [2], cache=tmp_path)
    first = cached.outputs(groups[0])
    calls: list[Group] = []
    again = Teacher(tiny, [2], cache=tmp_path)
    again._compute = lambda group: calls.append(group) or {}  # type: ignore[method-assign]
    second = again.outputs(groups[0])
    assert not calls
    for name, value in plain.items():
        assert torch.equal(first[name], value)
        assert torch.equal(second[name], value)
        assert second[name].dtype == value.dtype
    other = [Teacher(tiny, [3], cache=tmp_path).cache, Teacher(tiny, [2], "answer", cache=tmp_path).cache]
    assert len({cached.cache, *other}) == 3


def test_a_torn_cache_file_is_made_again(tiny: Backbone, groups: list[Group], tmp_path: Path) -> None:
    cached = Teacher(tiny, [2], cache=tmp_path)
    first = cached.outputs(groups[0])
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:5], b""):
        path.write_bytes(damage)
        again = cached.outputs(groups[0])
        assert all(torch.equal(value, first[name]) for name, value in again.items())
        assert path.read_bytes() == whole


def test_rows_of_one_picture_make_one_group(tmp_path: Path, pictures: list[Image.Image]) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, picture in zip(paths, pictures, strict=False):
        picture.save(path)
    rows = [Row("a", paths[0], ["x", "y"]), Row("b", paths[1]), Row("c", paths[0], "z")]
    first, second = group_rows(rows)
    assert (first.turns, second.turns) == ((("a", "x"), ("c", "z")), (("b", None),))
    assert first.open().tobytes() == pictures[0].tobytes()
    assert [g.key for g in group_rows(rows)] == [first.key, second.key]
    pictures[2].save(paths[0])  # another picture under the same name has another key
    assert group_rows(rows)[0].key != first.key
    assert group_rows([Row("a", paths[1], "x")])[0].key != second.key
