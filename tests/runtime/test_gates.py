"""Gates inside the language model: nothing is dropped, and at 0 and 1 it is as if it were."""

from typing import Any

import pytest
import torch
from families import build, one
from torch import Tensor

from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.runtime import Session, encode, run_decoder, shorten
from lit_reduce.runtime.compact import unreduced
from lit_reduce.runtime.decoder.hooks import DecoderHooks
from lit_reduce.tokens import Budget, Course, Reduction, VisualTokens

KEEP = 0.5


class Gating(Reducer):
    """Before layers 0, 1 and 3: keeps what a learned map finds large, another count of each image; or gates it so."""

    name, site, adaptive_count, signals = "gating", "decoder", True, frozenset({"gate", "place"})

    def __init__(self, sharp: float = 1e6) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.map, self.sharp = torch.nn.Linear(32, 1), sharp
        self.seen: list[tuple[int, Course]] = []

    def stages(self, depth: int, tokens: int, keep: int) -> dict[int, int]:
        return {0: keep + 2, 1: keep + 1, 3: keep}

    def reduce(self, tokens: VisualTokens, keep: int) -> Reduction:
        x, gate = tokens.features, tokens.signal("gate")
        self.seen.append((tokens.layer, tokens.course))
        score = self.map(torch.nn.functional.normalize(x, dim=-1))[..., 0] + 0.05 * torch.cos(tokens.signal("place"))
        best = score.masked_fill(gate < 0.5, -torch.inf).amax(1, keepdim=True).detach()
        smooth = self.sharp < 1e3 and tokens.course.progress is not None
        bar = torch.full_like(best, 0.02) if smooth else (best - 1e-3).clamp(max=0.02)
        mask = torch.sigmoid(self.sharp * (score - bar))
        if tokens.course.progress is not None:
            every = torch.arange(tokens.count).expand(len(x), -1)
            return Reduction(every, gate=mask, losses={"open": (gate * mask).sum(1)})
        stay = mask > 0.5
        order = torch.argsort((~stay).int(), dim=1, stable=True)[:, : int(stay.sum(1).max())]
        return Reduction(order, valid=stay.gather(1, order))


def logits(tiny: Any, inputs: dict[str, Any], reducer: Reducer, progress: float | None) -> tuple[Tensor, DecoderHooks]:
    with Session(tiny.model, {"decoder": (reducer, Budget(KEEP))}, progress=progress).install() as session:
        short, _ = session.shorten(inputs)
        with session.reading():
            return run_decoder(tiny.model, short), session.handlers[0].hooks


def unshortened(tiny: Any) -> dict[str, Any]:
    encoded = encode(tiny.model, tiny.inputs)
    return shorten(tiny.model, tiny.inputs, encoded, unreduced(encoded))[0]


FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3", "paligemma"]


@pytest.mark.parametrize(
    ("family", "kernel"), [*((family, "sdpa") for family in FAMILIES), ("llava", "eager"), ("gemma3", "eager")]
)
@torch.no_grad()
def test_soft_equals_hard(family, kernel):
    tiny, reducer = build(family, kernel), Gating()
    hard, dropped = logits(tiny, tiny.inputs, reducer, None)
    soft, gated = logits(tiny, tiny.inputs, reducer, 0.0)
    plain = run_decoder(tiny.model, unshortened(tiny))
    seen = tiny.inputs["attention_mask"].bool() & hard.any(-1)
    assert float((soft - hard)[seen].abs().max()) < 1e-4
    assert float((soft - plain)[seen].abs().max()) > 1e-2, "the gates must matter, or the test proves nothing"
    assert any(count < picture.entered for count, picture in zip(dropped.counts[-1], gated.pictures, strict=True))
    for less, whole in zip(dropped.pictures, gated.pictures, strict=True):
        assert whole.count == whole.entered
        assert (whole.gate > 0.5).nonzero()[:, 0].tolist() == less.kept_indices.tolist()


def test_a_gate_between_lets_through_as_much_as_it_says_and_gradients_reach_the_reducer_alone():
    tiny, reducer = build("llava"), Gating(sharp=3.0)
    tiny.model.requires_grad_(False)
    soft, inside = logits(tiny, tiny.inputs, reducer, 0.0)
    gates = torch.cat([picture.gate for picture in inside.pictures])
    assert ((gates > 0.05) & (gates < 0.95)).any()
    soft[:, -1].logsumexp(-1).sum().backward()
    assert all(float(weight.grad.abs().sum()) > 0 for weight in reducer.parameters())
    assert all(weight.grad is None for weight in tiny.model.parameters())

    def value() -> float:
        with torch.no_grad():
            return float(logits(tiny, tiny.inputs, reducer, 0.0)[0][:, -1].double().logsumexp(-1).sum())

    step, ends = 1e-2, []
    for sign in (1, -1):
        reducer.map.weight.data[0, 6] += sign * step
        ends.append(value())
        reducer.map.weight.data[0, 6] -= sign * step
    slope = float(reducer.map.weight.grad[0, 6])
    assert abs((ends[0] - ends[1]) / (2 * step) - slope) < 0.05 * float(reducer.map.weight.grad.abs().max())


def test_layers_whose_mask_has_a_gradient_read_states_that_have_one():
    """Or the fused kernel on GPUs breaks off: it keeps nothing for the mask's gradient alone."""
    tiny, seen = build("llava"), []
    tiny.model.requires_grad_(False)

    def look(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((kwargs["attention_mask"].requires_grad, kwargs["hidden_states"].requires_grad))

    hooks = [x.self_attn.register_forward_pre_hook(look, with_kwargs=True) for x in tiny.model.get_decoder().layers]
    logits(tiny, tiny.inputs, Gating(sharp=3.0), 0.0)
    encoded = encode(tiny.model, tiny.inputs)
    short = unshortened(tiny)
    bias = [torch.zeros(len(x), requires_grad=True) for x in encoded.features]
    run_decoder(tiny.model, short, key_bias=bias)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 * len(hooks)
    assert set(seen) == {(True, True)}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("progress", [None, 0.5])
@torch.no_grad()
def test_a_batch_equals_its_samples(family, progress):
    tiny = build(family)
    together, _ = logits(tiny, tiny.inputs, Gating(sharp=8.0), progress)
    for row in (0, 1):
        alone, _ = logits(tiny, one(tiny, row), Gating(sharp=8.0), progress)
        real = tiny.inputs["attention_mask"][row].bool()
        assert float((together[row][real] - alone[0]).abs().max()) < 1e-4


@pytest.mark.parametrize("progress", [None, 0.25])
@torch.no_grad()
def test_a_reducer_is_told_how_its_images_came_there(progress):
    tiny, reducer = build("llava"), Gating(sharp=8.0)
    _, inside = logits(tiny, tiny.inputs, reducer, progress)
    seen: dict[int, list[float]] = {}
    for layer, course in reducer.seen:
        assert (course.depth, course.tokens, course.keep, course.progress) == (5, 36, 18, progress)
        seen.setdefault(layer, []).extend(course.spent.tolist())
    assert set(seen) == {0, 1, 3}
    assert seen[0] == [0.0] * 3
    if progress is None:
        for layer in (1, 3):  # images of equal count share a call; one of whom a single token is left is not asked
            spent = [float(sum(counts)) for counts in zip(*inside.counts[:layer], strict=True)]
            asked = [one for one, left in zip(spent, inside.counts[layer - 1], strict=True) if left > 1]
            assert sorted(seen[layer]) == sorted(asked)
            assert asked
    else:
        assert all(one < 36 for one in seen[1])
        assert all(b > a for a, b in zip(seen[1], seen[3], strict=True))


@torch.no_grad()
def test_gates_need_a_mask_that_can_be_added_to():
    tiny = build("llava")
    _, inside = logits(tiny, tiny.inputs, Gating(), 0.0)
    inside._state = None
    from lit_reduce.runtime.decoder.prefill_state import PrefillState

    state = PrefillState(None, 2, 4, 0, torch.device("cpu"))
    state.pictures = [picture.gated(torch.ones(36)) for picture in inside.pictures]
    with pytest.raises(UserError, match="sdpa or eager"):
        state.gated(torch.ones(2, 4), torch.float32)
