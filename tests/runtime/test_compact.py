"""A shortened prompt holds the text, the kept tokens, their positions, and nothing else."""

import pytest
import torch
from shortening import compact

from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer, create
from lit_reduce.runtime import encode
from lit_reduce.tokens import Reduction

IMAGE = 3


class Fixed(Reducer):
    """Returns what it was given."""

    name = "fixed"

    def __init__(self, reduction):
        super().__init__()
        self.reduction = reduction

    def reduce(self, tokens, keep):
        return self.reduction


def test_text_survives_in_order_with_its_positions(tiny, batch, reducer):
    short, logical = compact(tiny.model, batch, encode(tiny.model, batch, reducer.signals), reducer, 10)
    for row in range(2):
        ids, mask = batch["input_ids"][row], batch["attention_mask"][row].bool()
        real = short["attention_mask"][row].bool()
        text, kept = ids[mask & (ids != IMAGE)], short["input_ids"][row][real]
        assert torch.equal(kept[kept != IMAGE], text)
        position = (mask.cumsum(0) - 1)[logical.selected[row]]
        assert torch.equal(short["position_ids"][row][real], position)
        assert torch.equal(ids[logical.selected[row]], kept)
        assert real.int().diff().min() >= 0, "padding is on the left"
        assert not short["input_ids"][row][~real].any()
    assert (short["input_ids"] == IMAGE).sum() == sum(logical.kept)
    assert [len(x) for x in logical.kept_indices] == logical.kept
    assert logical.total == [36] * 3


def test_one_encoding_serves_many_reductions(tiny, batch, reducer, helpers):
    encoded = encode(tiny.model, batch, {"cls"})
    copies = [x.clone() for x in encoded.features]
    outs = []
    for keep in (10, 3, 36, 10):
        short, logical = compact(tiny.model, batch, encoded, reducer, keep)
        outs.append(tiny.model.generate(**short, **helpers.greedy, num_beams=2))
        if keep == 36:
            plain = tiny.model.generate(**batch, **helpers.greedy, num_beams=2)
            assert torch.equal(outs[-1].sequences, plain.sequences)
            assert helpers.gap(outs[-1], plain) == 0
            assert logical.total == logical.kept
    assert helpers.gap(outs[0], outs[3]) == 0
    assert all(torch.equal(a, b) for a, b in zip(encoded.features, copies, strict=True))


def test_labels_and_token_types_follow(tiny, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    extra = batch | {"labels": labels, "token_type_ids": (batch["input_ids"] == IMAGE).long()}
    short, _ = compact(tiny.model, extra, encode(tiny.model, batch), create("random"), 5)
    real = short["attention_mask"].bool()
    assert torch.equal(short["labels"], short["input_ids"].masked_fill(~real, -100))
    assert torch.equal(short["token_type_ids"], (short["input_ids"] == IMAGE).long())
    assert "pixel_values" not in short


def test_a_reducer_is_called_once_for_equal_counts(tiny, batch):
    calls = []
    reducer = create("grid")
    reducer.register_forward_hook(lambda _, args, out: calls.append(args[0].features.shape))
    encoded = encode(tiny.model, batch)
    compact(tiny.model, batch, encoded, reducer, 0.25)
    assert calls == [(3, 36, 32)]


def test_unequal_counts_are_reduced_in_groups(tiny):
    """Families with tiles or any resolution give every image another count; the order of images must survive."""
    from lit_reduce.runtime.encode import Encoded

    torch.manual_seed(0)
    counts = [4, 6, 4, 9]
    encoded = Encoded([torch.randn(n, 32) for n in counts], [(1, n // 2, 2) for n in counts], [0, 0, 1, 1])
    ids = torch.tensor([[0] * 3 + [IMAGE] * 10 + [7], [IMAGE] * 4 + [8] + [IMAGE] * 9])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    reducer = create("random")
    short, logical = compact(tiny.model, inputs, encoded, reducer, 0.5)
    assert logical.kept == [2, 3, 2, 5]
    assert short["attention_mask"].sum(1).tolist() == [6, 8]
    for x, new, kept_indices in zip(
        encoded.features, short["mm_encoder_outputs"]["image"].pooler_output, logical.kept_indices, strict=True
    ):
        assert torch.equal(new, x[kept_indices])


def test_prompts_without_images_stay_as_they_are(tiny, helpers):
    text = tiny.prepare([None, None], ["what is the red w30 ?", "w40"])
    short, logical = compact(tiny.model, text, encode(tiny.model, text, {"cls", "text"}), create("grid"), 4)
    out = tiny.model.generate(**short, **helpers.greedy)
    assert helpers.gap(out, tiny.model.generate(**text, **helpers.greedy)) == 0
    assert logical.kept == logical.total == []


def test_new_features_keep_their_gradient_and_the_models_dtype(tiny, batch, uneven):
    encoded = encode(tiny.model, batch)
    short, _ = compact(tiny.model, batch, encoded, uneven.double(), 10)
    features = short["mm_encoder_outputs"]["image"].pooler_output
    assert {x.dtype for x in features} == {torch.float32}
    torch.cat(features).sum().backward()
    assert float(uneven.mix.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("kept_indices", "valid"),
    [
        ([[2, 1, 3]], None),
        ([[1, 1, 3]], None),
        ([[1, 2, 36]], None),
        ([[-1, 2, 3]], None),
        ([[1, 2, 3]], [[True, False, True]]),
        ([[1, 2, 3]], [[False, False, False]]),
    ],
    ids=["unsorted", "twice", "beyond", "negative", "hole", "none"],
)
def test_a_faulty_reducer_is_caught(tiny, batch, kept_indices, valid):
    valid = None if valid is None else torch.tensor(valid).expand(3, -1)
    wrong = Fixed(Reduction(torch.tensor(kept_indices).expand(3, -1), features=torch.zeros(3, 3, 32), valid=valid))
    with pytest.raises(ValueError, match="ascending anchors"):
        compact(tiny.model, batch, encode(tiny.model, batch), wrong, 3)


def test_user_mistakes(tiny, batch):
    encoded = encode(tiny.model, batch)
    with pytest.raises(UserError, match="only 36"):
        compact(tiny.model, batch, encoded, create("grid"), 37)
    with pytest.raises(UserError, match="positions"):
        compact(tiny.model, batch, encoded, create("grid"), 3, positions="drop")
    with pytest.raises(UserError, match="cls"):
        compact(tiny.model, batch, encoded, create("fastervlm"), 3)
