"""The student: soft equals hard (invariant 3), gradients reach the reducer alone, answers stay hidden."""

import pytest
import torch

from lit_reduce.backbones import Backbone
from lit_reduce.data.groups import Group
from lit_reduce.distill.batch import Batch, make_batch
from lit_reduce.distill.relaxation import exact
from lit_reduce.distill.student import relaxed_logits, sees, student_logits
from lit_reduce.distill.teacher import Teacher
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.decoder.run import run_decoder
from lit_reduce.runtime.encode import prompt_text


@pytest.mark.parametrize("candidates", [36, 20, 10])
@pytest.mark.parametrize("tau", [0.3, 0.01])
def test_soft_equals_hard(tiny: Backbone, batch: Batch, covipal: Reducer, candidates: int, tau: float) -> None:
    with torch.no_grad():
        hard, labels, rows = student_logits(tiny.model, covipal, batch, 10)
        gated = exact(covipal.score(sees(tiny.model, covipal, batch)), 10, tau, candidates)
        soft, *same = relaxed_logits(tiny.model, batch, gated)
        other, *_ = student_logits(tiny.model, covipal, batch, 9)
    # A dropped key keeps a weight of 1e-6.
    torch.testing.assert_close(soft, hard, atol=1e-3, rtol=0)
    assert torch.equal(same[0], labels)
    assert torch.equal(same[1], rows)
    assert (hard - other).abs().max() > 0.05  # one token more or less is far outside that tolerance


def test_keeping_all_is_the_teacher(tiny: Backbone, batch: Batch, covipal: Reducer) -> None:
    with torch.no_grad():
        hard, labels, rows = student_logits(tiny.model, covipal, batch, 36)
    seen = hard.log_softmax(-1).gather(1, batch.top_ids)
    torch.testing.assert_close(seen, batch.top, atol=2e-2, rtol=0)  # teacher outputs are in half precision
    assert labels.tolist() == batch.labels[batch.labels >= 0].tolist()
    assert rows.tolist() == (batch.labels >= 0).nonzero()[:, 0].tolist()


def test_dropping_equals_hiding(tiny: Backbone, batch: Batch, covipal: Reducer) -> None:
    with torch.no_grad():
        hard, *_ = student_logits(tiny.model, covipal, batch, 7)
        best = covipal.score(sees(tiny.model, covipal, batch)).topk(7, dim=1).indices
        mask = batch.mask.clone()
        for row, kept in enumerate(best):
            image = (batch.ids[row] == tiny.model.config.image_token_id).nonzero()[:, 0]
            mask[row, image] = 0
            mask[row, image[kept]] = 1
        positions = (batch.mask.cumsum(1) - 1).clamp_min(0)
        inputs = {"input_ids": batch.ids, "attention_mask": mask, "position_ids": positions}
        whole = run_decoder(tiny.model, inputs, batch.features)
    torch.testing.assert_close(hard, whole[:, :-1][batch.labels[:, 1:] >= 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("candidates", [36, 14])
def test_gradients_reach_the_reducer_and_nothing_else(
    tiny: Backbone, batch: Batch, covipal: Reducer, candidates: int
) -> None:
    scores = covipal.score(sees(tiny.model, covipal, batch))
    scores.retain_grad()
    logits, labels, _ = relaxed_logits(tiny.model, batch, exact(scores, 6, 0.3, candidates))
    torch.nn.functional.cross_entropy(logits, labels).backward()
    order = scores.detach().argsort(1, descending=True)
    for grad, ranked in zip(scores.grad, order, strict=True):
        dropped = grad[ranked[6:14]]  # each on its own merits, not all pushed one way by what is kept
        assert dropped.min() < 0 < dropped.max()
    for name, weight in covipal.named_parameters():
        assert weight.grad.abs().max() > 1e-6, name
    assert all(weight.grad is None for weight in tiny.model.parameters())


def test_few_candidates_give_nearly_the_gradient_of_all(tiny: Backbone, batch: Batch) -> None:
    grads = []
    for candidates in (36, 16):
        scores = torch.randn(5, 36, generator=torch.Generator().manual_seed(0)).requires_grad_()
        logits, labels, _ = relaxed_logits(tiny.model, batch, exact(scores, 8, 0.1, candidates))
        torch.nn.functional.cross_entropy(logits, labels).backward()
        grads.append(scores.grad)
    assert torch.nn.functional.cosine_similarity(*grads, dim=1).min() > 0.95


def test_the_gradient_points_to_better_choices(tiny: Backbone, batch: Batch) -> None:
    """Scores trained directly fall in loss: the hard forward pass improves along the soft gradient."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 36, generator=generator, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.1)
    losses = []
    for _ in range(12):
        logits, labels, _ = relaxed_logits(tiny.model, batch, exact(scores, 6, 0.3, 36))
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-4:]) < losses[0] - 0.2


def test_reducers_see_prompts_and_never_answers(tiny: Backbone, teacher: Teacher, pictures) -> None:
    batches = []
    for answer in ("w40 w41", "w70 w71", "w90"):
        group = Group("x", pictures[0].copy, (("what is red ?", answer),))
        batches.append(make_batch([(teacher.outputs(group), [0])]))
    inputs = tiny.prepare([pictures[0]], ["what is red ?"])
    text, mask = prompt_text(tiny.model, inputs)
    for made in batches:
        encoded = made.encoded(tiny.model)
        assert torch.equal(encoded.text, text)
        assert torch.equal(encoded.text_mask, mask)


def test_a_batch_is_laid_out_as_the_processor_would(tiny: Backbone, batch: Batch, groups: list[Group]) -> None:
    order = [(0, 0), (0, 1), (0, 2), (1, 2), (1, 0)]
    for row, (g, t) in enumerate(order):
        prompt, answer = groups[g].turns[t]
        real = batch.ids[row][batch.mask[row].bool()].tolist()
        asked = tiny.prepare([groups[g].open()], [prompt])["input_ids"][0].tolist()
        reply = [*tiny.processor.tokenizer(answer, add_special_tokens=False).input_ids, 2]
        assert real == asked + reply
        assert batch.labels[row][batch.labels[row] >= 0].tolist() == reply
        assert batch.labels[row, -1] == 2  # padding on the left
    moved = batch.to(torch.device("cpu"))
    assert (moved.grid, moved.step) == ((1, 6, 6), batch.step)
    assert torch.equal(moved.guide, batch.guide)
