"""FlexAttention: what is chosen, what is projected, and that exact maps give exactly full attention."""

from typing import Any

import pytest
import torch
import transformers as hf

from lit_reduce.backbones.identity import identify
from lit_reduce.distill.kv_regression import keys_and_values, teach_keys
from lit_reduce.errors import UserError
from lit_reduce.ops.similarity import rms_normalize
from lit_reduce.plugin import create_for
from lit_reduce.recall import AttentionRecall
from lit_reduce.reducer import create
from lit_reduce.runtime.recall.hooks import RecallHooks
from lit_reduce.runtime.recall.memory import ImageMemory, MemoryEntry
from lit_reduce.tokens import VisualTokens


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    options = {"hidden_size": 6, "depth": 4, "rank": 3, "key_size": 8, **options}
    return create("flexattention", **options).eval().requires_grad_(False)


def test_the_short_stream_is_that_of_the_reducer_beneath() -> None:
    tokens = VisualTokens(torch.randn(2, 24, 6), (1, 4, 6))
    for name in ("pool", "resize", "grid"):
        mine, theirs = build(short=name)(tokens, 6), create(name)(tokens, 6)
        assert torch.equal(mine.kept_indices, theirs.kept_indices)
        assert torch.equal(mine.gather(tokens), theirs.gather(tokens))
        assert mine.memory.shape == (2, 24, 3)
        owners = mine.assignment.gather(1, mine.kept_indices)
        assert torch.equal(owners, torch.arange(6).expand(2, -1))
    assert build(short="fastervlm").signals == {"cls"}
    keeping = build()(tokens, 24)
    assert keeping.features is None
    assert keeping.memory is None


@pytest.mark.parametrize(
    ("first", "depth", "layers"), [(0.28, 32, (9, 31)), (0.28, 6, (2, 5)), (3, 6, (3, 5)), (0.01, 4, (1, 3))]
)
def test_layers_from_the_first_on(first: float, depth: int, layers: tuple[int, int]) -> None:
    found = build(first=first).recalls(depth)
    assert (found[0], found[-1]) == layers


def test_a_threshold_between_the_least_and_the_most_attended() -> None:
    row = torch.tensor([[[0.10, 0.12, 0.50, 0.18, 9.0], [0.3, 0.3, 0.3, 0.3, 9.0]]])
    real = torch.tensor([[True] * 4 + [False]])
    seen = build().choose(row, real)  # 48 / 255 of the way from 0.10 to 0.50 is 0.1753
    assert seen.tolist() == [[[False, False, True, True, False], [False] * 5]]
    assert build(threshold=-1.0).choose(row, real).sum() == 8


def test_an_exact_share_and_ties_to_the_first() -> None:
    row, real = torch.tensor([[[1.0, 3.0, 3.0, 3.0, 0.0, 9.0]]]), torch.tensor([[True] * 5 + [False]])
    assert build(share=0.4).choose(row, real).tolist() == [[[False, True, True, False, False, False]]]
    assert build(share=1.0).choose(row, real).tolist() == [[[True] * 5 + [False]]]


def test_only_what_is_chosen_is_projected() -> None:
    reducer, asked = build(share=0.25), []
    reducer.gates.fill_(0.05)
    row = torch.tensor([[[9.0, 1, 1, 1, 1, 1, 1, 8.0]], [[1.0, 9, 1, 1, 8, 1, 1, 1]]])

    def turn(keys: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        asked.append(index.sort(1).values.tolist())
        return keys.unflatten(-1, (2, -1)).transpose(1, 2)

    torch.manual_seed(0)
    look = AttentionRecall(
        2, torch.randn(2, 4, 1, 4), 0.5, torch.randn(2, 1, 4, 4), torch.randn(2, 4, 1), torch.randn(2, 8, 3),
        torch.ones(2, 8, dtype=torch.bool), row, turn,
    )  # fmt: skip
    assert not torch.equal(reducer.recall(look), look.answer)
    assert asked == [[[0, 7], [1, 4]]]
    reducer.gates.zero_()
    assert torch.equal(reducer.recall(look), look.answer)


@torch.no_grad()
def test_exact_maps_of_everything_are_full_attention() -> None:
    """One layer whose first norm leaves tokens of size 1 alone, so that its keys are a linear map of the features."""
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    lm = hf.LlamaModel(hf.LlamaConfig(**text, num_hidden_layers=2, vocab_size=10)).eval()
    for weight in lm.parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.5)
    reducer = create("flexattention", hidden_size=16, depth=2, rank=16, key_size=8, first=1, threshold=-1.0)
    # Layer 0 does nothing but rank: what enters layer 1 is what entered the model.
    for name in ("o_proj", "down_proj"):
        getattr(lm.layers[0].self_attn if name == "o_proj" else lm.layers[0].mlp, name).weight.zero_()
    attention = lm.layers[1].self_attn
    reducer.trunk.weight.copy_(torch.eye(16))
    reducer.heads[0].weight.copy_(torch.cat([attention.k_proj.weight, attention.v_proj.weight]))
    reducer.heads[0].bias.zero_()
    reducer.gates.fill_(9.0)
    picture, short, words = rms_normalize(torch.randn(1, 9, 16)), torch.randn(1, 2, 16), torch.randn(1, 3, 16)
    places = torch.arange(1, 10)
    # The reference has the full tokens in its sequence, beside the short ones, and the last word alone sees them.
    whole = torch.cat([words[:, :1], picture, short, words[:, 1:]], 1)
    at = torch.cat([torch.zeros(1), places, torch.tensor([3.0, 7.0]), torch.tensor([10.0, 11.0])]).long()[None]
    mask = torch.full((14, 14), torch.finfo(torch.float32).min).triu(1)
    mask[:-1, 1:10] = torch.finfo(torch.float32).min
    mask[range(1, 10), range(1, 10)] = 0
    wanted = lm(inputs_embeds=whole, position_ids=at, attention_mask=mask[None, None], use_cache=False)
    inputs = torch.cat([words[:, :1], short, words[:, 1:]], 1)
    model = type("Model", (), {"get_decoder": lambda self: lm})()
    held = MemoryEntry(0, torch.tensor([1, 2]), reducer.trunk(picture[0]), torch.arange(9) % 2, places)
    recalling = RecallHooks(model, reducer).install()
    near = torch.cat([at[:, :1], at[:, 10:]], 1)
    with recalling.reading(ImageMemory([held], torch.tensor([4]), 1, id(reducer))):
        found = lm(inputs_embeds=inputs, position_ids=near, attention_mask=torch.ones(1, 5), use_cache=False)
    recalling.remove()
    plain = lm(inputs_embeds=inputs, position_ids=near, attention_mask=torch.ones(1, 5), use_cache=False)
    torch.testing.assert_close(found.last_hidden_state[0, -1], wanted.last_hidden_state[0, -1], atol=1e-5, rtol=0)
    assert (plain.last_hidden_state[0, -1] - wanted.last_hidden_state[0, -1]).abs().max() > 0.05
    assert torch.equal(found.last_hidden_state[:, :-1], plain.last_hidden_state[:, :-1])


def test_maps_start_as_the_regression_of_the_decoders_own_keys_and_values(tiny: Any) -> None:
    """Of full rank they are least squares on each layer by itself; of low rank one trunk serves all."""
    model, width = tiny.model, tiny.model.config.text_config
    size = width.num_key_value_heads * width.head_dim
    features = [torch.randn(36, 32, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    prefix = torch.tensor([1, *[model.config.image_token_id] * 36])
    pictures = [{"features": x, "prefix": prefix} for x in features]
    reducer: Any = create_for(identify(model), "flexattention", {"rank": 40, "first": 1, "key_size": size})
    teach_keys(model, reducer, pictures)
    layers = list(reducer.recalls(len(model.get_decoder().layers)))
    targets = torch.cat([keys_and_values(model, prefix, x, layers) for x in features]).double()
    inputs = torch.cat([rms_normalize(x) for x in features]).double()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1).double()], 1)
    with torch.no_grad():
        code = reducer.trunk(rms_normalize(torch.cat(features)))
        for number in range(len(layers)):
            found = reducer.heads[number](code).double()
            target = targets[:, 2 * number : 2 * number + 2].flatten(1)
            wanted = inputs @ torch.linalg.lstsq(inputs, target).solution
            torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-2)
    assert not reducer.gates.any()


def test_settings_that_cannot_be() -> None:
    for options in ({"first": 0}, {"first": 1.5}, {"rank": 0}, {"share": 1.5}, {"short": "packer"}, {"short": "fastv"}):
        with pytest.raises(UserError, match=f"flexattention: .*{next(iter(options))}"):
            build(**options)
