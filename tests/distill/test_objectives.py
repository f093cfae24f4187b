"""What a batch teaches: scores, new tokens, or answers alone; and what the teacher must tell for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_reduce.backbones import Backbone
from lit_reduce.data.groups import Group
from lit_reduce.distill.batch import Batch, make_batch
from lit_reduce.distill.module import Distiller
from lit_reduce.distill.objectives import OBJECTIVES
from lit_reduce.distill.student import reduce, student_logits
from lit_reduce.distill.teacher import Teacher
from lit_reduce.distill.trainer import fit
from lit_reduce.reducer import WARMUP_TARGETS, Reducer, create
from lit_reduce.runtime.decoder.attention_rows import from_tower
from lit_reduce.runtime.encode import encode

LEVELS = {"levels": [1, -1], "text": True}


def make_packer(**options: Any) -> Reducer:
    torch.manual_seed(1)
    return create("packer", hidden_size=32, vision_hidden_size=24, width=16, heads=2, **options)


def test_every_word_has_a_lesson() -> None:
    assert set(OBJECTIVES) == set(WARMUP_TARGETS)


def test_the_teacher_tells_what_the_reducer_asks_of_the_tower(
    tiny: Backbone, groups: list[Group], tmp_path: Path
) -> None:
    packer = make_packer(**LEVELS)
    teacher = Teacher(tiny, [2], cache=tmp_path, signals=from_tower(packer))
    assert teacher.cache != Teacher(tiny, [2], cache=tmp_path).cache, "outputs without signals would be taken for these"
    batch = make_batch([(teacher.outputs(groups[0]), [0, 1]), (teacher.outputs(groups[1]), [2])]).to(
        torch.device("cpu")
    )
    assert set(batch.signals) == {"encoder@1", "encoder@-1"}
    for row, group in enumerate((groups[0], groups[0], groups[1])):
        inputs = tiny.prepare([group.open()], ["what ?"])
        straight = encode(tiny.model, inputs, packer.signals)
        for name, given in batch.signals.items():
            torch.testing.assert_close(given[row], straight.signals[name][0], atol=5e-3, rtol=1e-2)  # half precision
    again = make_batch([(teacher.outputs(groups[0]), [0, 1])])  # from the cache
    assert all(torch.equal(again.signals[name], x[:2]) for name, x in batch.signals.items())
    made = reduce(tiny.model, packer, batch, 5)
    assert made.features is not None
    assert torch.equal(made.features, create("pool")(batch.encoded(tiny.model).tokens([0, 1, 2], ()), 5).features)


def test_a_new_token_starts_as_its_region_and_warms_up_towards_what_is_read_of_it(
    tiny: Backbone, batch: Batch, make: Any, tmp_path: Path
) -> None:
    packer = make_packer(text=True)
    chosen = make.settings(tmp_path, budgets=[6, 6], guide_steps=40, steps=60)
    module = Distiller(tiny.model, packer, chosen)
    optimizer, seen = torch.optim.Adam(packer.parameters(), lr=3e-3), []
    for _ in range(30):
        losses = module.losses(batch)
        assert set(losses) == {"loss", "reading"}
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append(float(losses["loss"].detach()))
    assert seen[-1] < 0.7 * seen[0]
    batch.step = 40
    assert set(module.losses(batch)) == {"loss", "kl", "ce"}  # the warm-up is over for good


def test_without_a_warm_up_answers_alone_teach(tiny: Backbone, batch: Batch, make: Any, tmp_path: Path) -> None:
    packer = make_packer()
    chosen = make.settings(tmp_path, budgets=[6, 6], guide_steps=0)
    losses = Distiller(tiny.model, packer, chosen).losses(batch)
    torch.testing.assert_close(losses["loss"], losses["kl"] + 0.5 * losses["ce"])
    losses["loss"].backward()
    assert packer.leave[-1].weight.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in tiny.model.parameters())


def test_a_budget_of_all_tokens_still_teaches(tiny: Backbone, batch: Batch, make: Any, tmp_path: Path) -> None:
    """All tokens pass untouched, so nothing could be learned of them, and the backward pass would fail."""
    for steps in (0, 1):
        packer = make_packer()
        chosen = make.settings(tmp_path, budgets=[36, 36], guide_steps=steps)
        Distiller(tiny.model, packer, chosen).losses(batch)["loss"].backward()
        assert packer.leave[-1].weight.grad.abs().sum() > 0


def test_training_moves_every_weight_and_brings_the_answers_nearer(
    tiny: Backbone, groups: list[Group], make: Any, tmp_path: Path
) -> None:
    packer = make_packer(**LEVELS)
    start = {name: x.clone() for name, x in packer.state_dict().items()}
    teacher = Teacher(tiny, [2, 3], signals=from_tower(packer))
    chosen = make.settings(tmp_path, guide_steps=3, steps=12, budgets=[6, 6], val_every=12)
    data = make.data(teacher, groups, chosen)
    batch = data.batch(0)
    with torch.no_grad():
        before = -student_logits(tiny.model, packer, batch, 6)[0].log_softmax(-1).gather(1, batch.top_ids[:, :1]).mean()
    trainer, average = fit(chosen, tiny.model, packer, data, tmp_path)
    assert trainer.global_step == 12
    assert {name for name, x in packer.state_dict().items() if not torch.equal(x, start[name])} == set(start)
    assert set(average.average) == set(start)
    with torch.no_grad():
        after = -student_logits(tiny.model, packer, batch, 6)[0].log_softmax(-1).gather(1, batch.top_ids[:, :1]).mean()
    assert after < before


def test_a_reducer_that_promises_tokens_must_make_them(
    tiny: Backbone, batch: Batch, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = create("grid")
    monkeypatch.setattr(type(grid), "warmup_target", "tokens")
    with pytest.raises(ValueError, match="grid says warmup_target='tokens'"):
        Distiller(tiny.model, grid, make.settings(Path("unused"))).losses(batch)


def make_mod(scale: float = 0.0) -> Reducer:
    reducer = create("mod", hidden_size=32, depth=5, alpha=0.2)
    generator = torch.Generator().manual_seed(2)
    for weight in reducer.parameters():
        weight.data.normal_(0, scale, generator=generator)
    return reducer


def test_routers_follow_the_attention_at_every_layer_then_the_answers_too(
    tiny: Backbone, batch: Batch, make: Any, tmp_path: Path
) -> None:
    mod = make_mod()
    chosen = make.settings(tmp_path, budgets=[9, 9], guide_steps=40, steps=60)
    module = Distiller(tiny.model, mod, chosen)
    optimizer, seen = torch.optim.Adam(mod.parameters(), lr=0.1), []
    for _ in range(15):
        losses = module.losses(batch)
        assert set(losses) == {"loss", "rank", "hinge"}
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append(float(losses["loss"].detach()))
    assert seen[-1] < 0.8 * seen[0]
    best = batch.guide.topk(9, dim=1).indices
    calls: list[Any] = []
    mod.register_forward_hook(lambda _, __, out: calls.append(out.scores))
    student_logits(tiny.model, mod, batch, 9)
    assert len(calls) == 5
    for scores in calls:  # every layer ranks as attention does, far better than chance
        hits = (scores.topk(9, dim=1).indices[..., None] == best[:, None]).any(-1).float().mean()
        assert hits > 0.5, "chance is a quarter"
    batch.step = 40
    assert set(module.losses(batch)) == {"loss", "kl", "ce", "rank", "hinge"}


def test_the_answers_gradient_of_a_router_is_the_slope(tiny: Backbone, batch: Batch) -> None:
    """A bias moves all logits of a layer alike: the choice stays, so differences can tell; norms are float32."""
    tiny.model.double()
    mod = make_mod(0.5).double()

    def loss() -> torch.Tensor:
        logits, labels, _ = student_logits(tiny.model, mod, batch, 12)
        return torch.nn.functional.cross_entropy(logits, labels)

    loss().backward()
    for layer in range(5):
        slopes = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                mod.bias[layer] += step
                slopes.append(float(loss()))
                mod.bias[layer] -= step
        assert mod.bias.grad[layer] == pytest.approx((slopes[0] - slopes[1]) / 2e-3, rel=0.02, abs=1e-4)
        # Norms undo a weight until something is added, and nobody reads pictures after the last layer.
        assert layer > 2 or mod.routers.grad[layer].abs().max() > 1e-5
    assert all(weight.grad is None for weight in tiny.model.parameters())


def make_voco(**options: Any) -> Reducer:
    torch.manual_seed(1)
    return create("voco", hidden_size=32, depth=5, key_size=16, tokens=4, rank=3, **options)


def test_learned_tokens_come_nearer_to_the_answers(tiny: Backbone, batch: Batch, make: Any, tmp_path: Path) -> None:
    voco = make_voco()
    module = Distiller(tiny.model, voco, make.settings(tmp_path, budgets=[4, 4], guide_steps=0))
    optimizer, seen = torch.optim.Adam(voco.parameters(), lr=3e-2), []
    for _ in range(12):
        losses = module.losses(batch)
        assert set(losses) == {"loss", "kl", "ce"}
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append(float(losses["loss"].detach()))
    assert seen[-1] < 0.8 * seen[0]
    for name, weight in voco.named_parameters():
        assert weight.grad.abs().max() > 1e-7, name
    assert all(weight.grad is None for weight in tiny.model.parameters())


def test_learned_tokens_read_a_picture_once_for_all_questions(tiny: Backbone, batch: Batch) -> None:
    voco = make_voco()
    for weight in voco.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    count, pictures = len(batch.ids), int(batch.picture.max()) + 1
    assert 1 < pictures < count
    read: list[tuple[int, ...]] = []
    tap = tiny.model.get_decoder().layers[0].register_forward_hook(lambda _, args, __: read.append(args[0].shape[:2]))
    try:
        found = student_logits(tiny.model, voco, batch, 3)
        apart = student_logits(tiny.model, voco, replace(batch, picture=torch.arange(count)), 3)
    finally:
        tap.remove()
    assert [rows for rows, _ in read] == [pictures, pictures, count, count, count, count]
    for one, other in zip(found, apart, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_gradient_of_learned_tokens_is_the_slope(tiny: Backbone, batch: Batch) -> None:
    tiny.model.double()
    voco = make_voco().double()
    generator = torch.Generator().manual_seed(2)
    for weight in voco.parameters():
        weight.data.normal_(0, 0.3, generator=generator)

    def loss() -> torch.Tensor:
        logits, labels, _ = student_logits(tiny.model, voco, batch, 3)
        return torch.nn.functional.cross_entropy(logits, labels)

    loss().backward()
    for name, weight in voco.named_parameters():
        place = int(weight.grad.abs().argmax())
        slopes = []
        for step in (1e-3, -1e-3):  # norms are float32
            with torch.no_grad():
                weight.view(-1)[place] += step
                slopes.append(float(loss()))
                weight.view(-1)[place] -= step
        assert float(weight.grad.view(-1)[place]) == pytest.approx((slopes[0] - slopes[1]) / 2e-3, rel=0.03), name
