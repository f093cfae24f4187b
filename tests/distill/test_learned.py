"""Every learned reducer of the register in training: gradients, a short fit, and the plug-in that comes out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from smallest import LEARNED, shake, sizes_of, smallest

from lit_reduce.backbones import Backbone
from lit_reduce.data.groups import Group
from lit_reduce.distill.batch import make_batch
from lit_reduce.distill.module import Distiller
from lit_reduce.distill.student import student_logits
from lit_reduce.distill.teacher import PIXELS, Teacher
from lit_reduce.distill.trainer import fit
from lit_reduce.plugin import PluginConfig, load_plugin, save_plugin
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.decoder.attention_rows import from_tower

KEEP = 24  # videollm_mod lets half of the layers see all 36 tokens, so its mean is above half


def teacher_of(tiny: Backbone, reducer: Reducer) -> Teacher:
    return Teacher(tiny, [2, 3], signals={PIXELS} if reducer.site == "encoder" else from_tower(reducer))


@pytest.mark.parametrize("name", LEARNED)
def test_each_weight_learns_in_one_of_the_stages_and_the_backbone_in_none(
    tiny: Backbone, groups: list[Group], make: Any, name: str
) -> None:
    reducer = shake(smallest(name, sizes_of(tiny.model)), 0.3).requires_grad_(True)
    teacher = teacher_of(tiny, reducer)
    batch = make_batch([(teacher.outputs(groups[0]), [0, 1, 2]), (teacher.outputs(groups[1]), [2, 0])])
    chosen = make.settings(Path("unused"), budgets=[KEEP, KEEP], guide_steps=4, steps=10)
    module, learns = Distiller(tiny.model, reducer, chosen), dict[str, float]()
    for step in (0, 7):
        batch.step = step
        reducer.zero_grad()
        losses = module.losses(batch)
        assert torch.isfinite(losses["loss"])
        losses["loss"].backward()
        for key, weight in reducer.named_parameters():
            size = 0.0 if weight.grad is None else float(weight.grad.abs().max())
            learns[key] = max(learns.get(key, 0.0), size)
    assert [key for key, size in learns.items() if size == 0] == []
    assert all(weight.grad is None for weight in tiny.model.parameters())


@pytest.mark.parametrize("name", LEARNED)
def test_a_short_fit_moves_the_reducer_and_the_plugin_answers_as_it_does(
    tiny: Backbone, groups: list[Group], make: Any, name: str, tmp_path: Path
) -> None:
    reducer = smallest(name, sizes_of(tiny.model)).train()
    start = {key: x.clone() for key, x in reducer.state_dict().items()}
    before = {key: x.clone() for key, x in tiny.model.state_dict().items()}
    teacher = teacher_of(tiny, reducer)
    chosen = make.settings(tmp_path / "run", budgets=[KEEP, KEEP], val_budgets=[KEEP], guide_steps=2, steps=4)
    data = make.data(teacher, groups, chosen)
    trainer, _ = fit(chosen, tiny.model, reducer, data, tmp_path / "run")
    assert trainer.global_step == 4
    assert any(not torch.equal(x, start[key]) for key, x in reducer.state_dict().items())
    assert all(torch.equal(x, before[key]) for key, x in tiny.model.state_dict().items())
    save_plugin(tmp_path / "plugin", reducer, PluginConfig(name, {}, tiny.identity, [KEEP]))
    loaded, _ = load_plugin(tmp_path / "plugin", backbone=tiny.identity)
    with torch.no_grad():
        logits = [student_logits(tiny.model, x.eval(), data.batch(0), KEEP)[0] for x in (reducer, loaded)]
    assert torch.equal(*logits)
