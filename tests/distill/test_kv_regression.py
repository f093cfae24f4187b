"""The decoder's own keys and values as they are read here, against its projections; and training that starts there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_reduce.backbones import Backbone
from lit_reduce.backbones.identity import identify
from lit_reduce.data.groups import Group
from lit_reduce.distill.kv_regression import keys_and_values
from lit_reduce.distill.module import Distiller
from lit_reduce.distill.teacher import Teacher
from lit_reduce.distill.trainer import fit
from lit_reduce.plugin import create_for
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.decoder.attention_rows import from_tower


def test_keys_are_those_before_rotary_embedding(tiny: Backbone, teacher: Teacher, groups: list[Group]) -> None:
    outputs, seen, handles = teacher.outputs(groups[0]), {}, []
    layers = tiny.model.get_decoder().layers
    for number in (1, 3):
        for name in ("k_proj", "v_proj"):
            module = getattr(layers[number].self_attn, name)
            handles.append(
                module.register_forward_hook(lambda _, __, out, at=(number, name): seen.update({at: out[0]}))
            )
    found = keys_and_values(tiny.model, outputs["prefix"], outputs["features"].float(), [1, 3])
    # Whole questions, through the model itself: what comes behind a picture has no say.
    tiny.model(**tiny.prepare([groups[0].open()], ["what is the red w30 here ?"]))
    image = (outputs["prefix"] == tiny.model.config.image_token_id).nonzero()[:, 0]
    for i, number in enumerate((1, 3)):
        for j, name in enumerate(("k_proj", "v_proj")):
            wanted = seen[number, name][image]
            torch.testing.assert_close(found[:, 2 * i + j], wanted, atol=2e-2, rtol=1e-2)  # features in half precision
            assert wanted.std() > 0.2
    for handle in handles:
        handle.remove()


def fresh(tiny: Backbone, name: str) -> Reducer:
    torch.manual_seed(0)
    config = tiny.model.config.text_config
    options: dict[str, Any] = {"first": 1, "rank": 8, "key_size": config.num_key_value_heads * config.head_dim}
    if name == "remember":
        options = {"width": 16, "levels": [1, -1], "layers": [1, 2], "options": {"width": 16, "heads": 2}}
    return create_for(identify(tiny.model), name, options)


@pytest.mark.parametrize("name", ["flexattention", "remember"])
def test_training_moves_every_weight_and_lowers_the_loss(
    name: str, tiny: Backbone, groups: list[Group], make: Any, tmp_path: Path
) -> None:
    reducer = fresh(tiny, name)
    start = {key: x.clone() for key, x in reducer.state_dict().items()}
    teacher = Teacher(tiny, [2, 3], signals=from_tower(reducer))
    chosen = make.settings(
        tmp_path, guide_steps=0 if name == "flexattention" else 3, steps=16, budgets=[6, 6], val_every=16,
        learning_rate=5e-3, pictures=2, turns=3,
    )  # fmt: skip
    data = make.data(teacher, groups, chosen)
    batch = data.batch(0)

    batch.step = 15  # what is taught last: the answers

    @torch.no_grad()
    def wrong() -> float:
        return float(Distiller(tiny.model, reducer, chosen).losses(batch)["loss"])

    before = wrong()
    trainer, _ = fit(chosen, tiny.model, reducer, data, tmp_path)
    assert trainer.global_step == 16
    assert {key for key, x in reducer.state_dict().items() if not torch.equal(x, start[key])} == set(start)
    assert wrong() < before
    assert all(weight.grad is None for weight in tiny.model.parameters())
