"""What a reducer inside the tower is taught by is what inference does, each picture once, gradients in it alone."""

import pytest
import torch

from lit_reduce.backbones import Backbone
from lit_reduce.data.groups import Group
from lit_reduce.distill.batch import Batch, make_batch
from lit_reduce.distill.data import DistillData
from lit_reduce.distill.module import Distiller
from lit_reduce.distill.student import reduce, student_logits
from lit_reduce.distill.teacher import PIXELS, Teacher
from lit_reduce.distill.tower_pass import through_tower
from lit_reduce.reducer import Reducer, create
from lit_reduce.runtime import attach


@pytest.fixture
def teacher(tiny: Backbone, tmp_path) -> Teacher:
    return Teacher(tiny, [2, 3], cache=tmp_path, signals={PIXELS})


@pytest.fixture
def batch(teacher: Teacher, groups: list[Group]) -> Batch:
    """Five questions about two pictures, from the cache on disk."""
    for _ in range(2):
        out = [teacher.outputs(group) for group in groups[:2]]
    return make_batch([(out[0], [0, 1, 2]), (out[1], [2, 0])])


def falcon(loud: bool = True) -> Reducer:
    reducer = create("falcon", hidden_size=32, vision_hidden_size=24, blocks=3, table=3, rank=4, reatten=0)
    generator = torch.Generator().manual_seed(2)
    for weight in reducer.parameters() if loud else ():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return reducer


@pytest.mark.parametrize("reducer", [falcon(), create("evit"), create("tome")], ids=lambda r: r.name)
@torch.no_grad()
def test_answers_are_those_of_inference(tiny: Backbone, batch: Batch, reducer: Reducer) -> None:
    logits, labels, rows = student_logits(tiny.model, reducer, batch, 10)
    pixels = batch.pixels["pixel_values"][batch.picture]
    assert len(batch.pixels["pixel_values"]) == 2
    with attach(tiny.model, reducer, keep=10) as attached:
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "pixel_values": pixels}
        whole = tiny.model(**inputs).logits
        assert attached.stats.kept == 50
    expected = whole[:, :-1][batch.labels[:, 1:] >= 0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert labels.tolist() == batch.labels[batch.labels >= 0].tolist()
    assert rows.tolist() == (batch.labels >= 0).nonzero()[:, 0].tolist()


@torch.no_grad()
def test_keeping_all_is_the_teacher(tiny: Backbone, batch: Batch) -> None:
    hard, *_ = student_logits(tiny.model, falcon(), batch, 36)
    seen = hard.log_softmax(-1).gather(1, batch.top_ids)
    torch.testing.assert_close(seen, batch.top, atol=2e-2, rtol=0)  # teacher outputs are in half precision


def test_the_tower_sees_each_picture_once(tiny: Backbone, batch: Batch) -> None:
    seen = []
    hook = tiny.model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    encoded, owners = through_tower(tiny.model, falcon(), batch, 6)
    hook.remove()
    assert seen == [2]
    assert len(encoded.features) == len(owners) == 5
    assert encoded.features[0] is encoded.features[2]
    assert not torch.equal(encoded.features[0], encoded.features[3])


def test_gradients_reach_the_reducer_and_nothing_else(tiny: Backbone, batch: Batch) -> None:
    reducer = falcon()
    logits, labels, _ = student_logits(tiny.model, reducer, batch, 6)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    for name, weight in reducer.named_parameters():
        assert weight.grad.abs().max() > 1e-6, name
    assert all(weight.grad is None for weight in tiny.model.parameters())
    reduction = reduce(tiny.model, reducer, batch, 6)
    assert reduction.features.requires_grad
    own = reduction.assignment.gather(1, reduction.kept_indices)
    assert torch.equal(own, torch.arange(6).expand(5, -1))


def test_both_stages_teach(teacher: Teacher, groups: list[Group], make, tmp_path) -> None:
    """On one batch, over and over: first towards what attention reads, then towards the answers."""
    for guide in (99, 0):
        settings = make.settings(tmp_path / str(guide), guide_steps=guide, steps=30, budgets=[6, 6], learning_rate=1e-2)
        module = Distiller(teacher.backbone.model, falcon(loud=False), settings)
        data: DistillData = make.data(teacher, groups, settings)
        optimizer = torch.optim.AdamW(module.reducer.parameters(), lr=1e-2)
        batch, seen = data.batches(0)[0], []
        for _ in range(25):
            losses = module.losses(batch)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            seen.append(float(losses["loss"].detach()))
        assert seen[-1] < 0.8 * seen[0]


def test_a_teacher_without_pixels_is_told_apart(tiny: Backbone, groups: list[Group], tmp_path) -> None:
    plain = Teacher(tiny, [2, 3], cache=tmp_path)
    assert plain.cache != Teacher(tiny, [2, 3], cache=tmp_path, signals={PIXELS}).cache
    batch = make_batch([(plain.outputs(groups[0]), [0])])
    with pytest.raises(ValueError, match="was not asked for pixels"):
        student_logits(tiny.model, falcon(), batch, 6)
