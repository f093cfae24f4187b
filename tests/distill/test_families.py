"""Training on every family: pictures of unequal size, labels as the template writes them, the plain model's words."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processors import ENDS, PROCESSORS, SIZES, backbone

from lit_reduce.backbones import Backbone
from lit_reduce.data.groups import Group
from lit_reduce.distill.batch import make_batches
from lit_reduce.distill.module import Distiller
from lit_reduce.distill.seeded_sampling import budget_of, tokens_of
from lit_reduce.distill.student import student_logits
from lit_reduce.distill.teacher import TOP, Teacher
from lit_reduce.plugin import create_for

TURNS = (("what is it ?", "red"), ("is it big ?", "yes it is"))
OPTIONS: dict[str, dict[str, Any]] = {
    "covipal": {"width": 16, "heads": 2, "layers": 1}, "atp": {}, "packer": {"width": 16}
}  # fmt: skip


def groups(sizes: list[tuple[int, int]] = SIZES) -> list[Group]:
    """A noisy picture of each size with two questions."""
    found = []
    for number, size in enumerate(sizes):
        torch.manual_seed(number)
        pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8).numpy()
        found.append(Group(str(number), Image.fromarray(pixels).copy, TURNS))
    return found


def plain(model: Backbone, picture: Image.Image, prompt: str, answer: list[int]) -> torch.Tensor:
    """Log-probabilities ``[A, V]`` of an answer that transformers' own forward gives, with its masks and positions."""
    inputs = model.prepare([picture], [prompt])
    inputs.pop("labels", None)
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    extra = 1 if model.family.name == "paligemma" else 0
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(answer)), value=extra)
    logits = model.model(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
    return logits[0, -len(answer) - 1 : -1].log_softmax(-1).detach()


@pytest.mark.parametrize("name", PROCESSORS)
def test_an_answer_is_what_the_template_makes_of_it(name: str) -> None:
    made = PROCESSORS[name]()
    model = Backbone(None, made, None, None)  # type: ignore[arg-type]
    spoken = model.answer_ids("what is it ?", "red")
    assert made.tokenizer.decode(spoken) == "".join(ENDS[name])
    if made.chat_template is None:
        return
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]}
    said: Any = "red" if name in ("mistral3", "pixtral") else [{"type": "text", "text": "red"}]
    whole = made.tokenizer(made.apply_chat_template([user, {"role": "assistant", "content": said}])).input_ids
    asked = made.tokenizer(made.apply_chat_template([user], add_generation_prompt=True)).input_ids
    own = spoken if name != "llava" else spoken[:-1]  # whose template leaves the end of text out
    assert whole[: len(asked) + len(own)] == asked + own


@pytest.mark.parametrize("name", PROCESSORS)
def test_teacher_and_student_are_the_plain_model(name: str) -> None:
    model = backbone(name)
    pictures = groups([(40, 24), (20, 20), (24, 40)])
    outputs = [Teacher(model, [3], stored=torch.float32).outputs(group) for group in pictures]
    batches = make_batches([(out, range(2)) for out in outputs])
    reducer = create_for(model.identity, "covipal", OPTIONS["covipal"])
    seen = []
    for batch in batches:
        with torch.no_grad():
            logits, labels, rows = student_logits(model.model, reducer, batch, batch.features.shape[1])
        starts = [0, *torch.bincount(rows).cumsum(0).tolist()]
        seen += [
            (number, logits[a:b].log_softmax(-1), labels[a:b], batch.top[a:b], batch.top_ids[a:b])
            for number, a, b in zip(batch.numbers.tolist(), starts, starts[1:], strict=False)
        ]
    assert sorted(number for number, *_ in seen) == list(range(6))
    for number, student, labels, top, top_ids in seen:
        group, (prompt, answer) = pictures[number // 2], TURNS[number % 2]
        expected = plain(model, group.open(), prompt, model.answer_ids(prompt, answer))
        assert labels.tolist() == model.answer_ids(prompt, answer)
        torch.testing.assert_close(student, expected, atol=2e-3, rtol=0)
        torch.testing.assert_close(top, expected.topk(min(TOP, expected.shape[1])).values, atol=2e-3, rtol=0)
        torch.testing.assert_close(top, expected.gather(1, top_ids), atol=2e-3, rtol=0)


@pytest.mark.parametrize("reducer", OPTIONS)
@pytest.mark.parametrize("name", PROCESSORS)
def test_both_stages_train_on_pictures_of_any_size(name: str, reducer: str, make: Any) -> None:
    model = backbone(name)
    made = create_for(model.identity, reducer, OPTIONS[reducer])
    chosen = make.settings(Path("unused"), budgets=[0.6, 0.7], val_budgets=[0.5], pictures=6, guide_steps=2, steps=4)
    data = make.data(Teacher(model, [3]), groups(), chosen)
    data.groups, data.val_groups = groups(), groups()[:2]
    module = Distiller(model.model, made, chosen)
    for step in (0, 3):
        batches = data.batches(step)
        if name not in ("llava", "paligemma", "gemma3"):
            assert len({batch.grid for batch in batches}) == len(batches) > 1
        loss = module.step_losses(batches)["loss"]
        loss.backward()
        assert loss.isfinite()
    assert sum(float(weight.grad.abs().sum()) for weight in made.parameters() if weight.grad is not None) > 0


def test_a_step_is_the_mean_over_its_questions(make: Any) -> None:
    model = backbone("qwen2_vl")
    reducer = create_for(model.identity, "covipal", OPTIONS["covipal"])
    chosen = make.settings(Path("unused"), budgets=[3])
    outputs = [Teacher(model, [3]).outputs(group) for group in groups()[:2]]
    module = Distiller(model.model, reducer, chosen)
    both = make_batches([(outputs[0], [0, 1]), (outputs[1], [1])], step=6)
    assert [batch.grid for batch in both] == [(1, 3, 5), (1, 5, 3)]
    alone = [float(module.losses(batch)["loss"].detach()) for batch in both]
    assert float(module.step_losses(both)["loss"].detach()) == pytest.approx((2 * alone[0] + alone[1]) / 3, rel=1e-5)


def test_ratios_and_counts_of_each_picture() -> None:
    drawn = [budget_of(step, 0, [0.1, 0.5], tokens=40) for step in range(200)]
    assert (min(drawn), max(drawn)) == (4, 20)
    assert {budget_of(step, 0, [0.5, 1.0], [1, 0], tokens=7) for step in range(9)} == {4}
    assert (tokens_of(64, 40), tokens_of(0.25, 40), tokens_of(8, 40)) == (40, 10, 8)
