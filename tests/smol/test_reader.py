import torch
from torch.nn.functional import cross_entropy

from lit_reduce_smol.packed import CLOSE, END, OPEN, collate, encode, pack
from lit_reduce_smol.reader import Reader, fold

TURNS = [
    [("What?", ["A dog.", "Two wet dogs."]), ("Is it so?", ["yes"])],
    [("Describe.", ["Nothing at all to see here."])],
]


def shaken_reader(language, tokenizer):
    reader = Reader(language, tokenizer)
    g = torch.Generator().manual_seed(1)
    for weight in reader.parameters():
        weight.data = torch.randn(weight.shape, generator=g) * 0.1
    return reader


def plain_losses(language, tokenizer, visual, question, answer):
    """The same by transformers, one answer at a time."""
    table = language.model.embed_tokens
    said = encode(tokenizer, answer + END)
    before, after = encode(tokenizer, OPEN), encode(tokenizer, "\n" + question + CLOSE) + said
    x = torch.cat([table(torch.tensor(before)), visual, table(torch.tensor(after))])[None]
    logits = language(inputs_embeds=x).logits[0]
    return cross_entropy(logits[-len(said) - 1 : -1], torch.tensor(said), reduction="none")


def test_packed_answers_cost_what_each_costs_alone(language, tokenizer):
    reader = shaken_reader(language, tokenizer)
    visual = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(2))
    found = reader(visual, collate([pack(turns, tokenizer) for turns in TURNS]))
    fold(language.model, reader.state_dict())
    with torch.no_grad():
        expected = torch.cat([
            plain_losses(language, tokenizer, visual[i], question, answer)
            for i, turns in enumerate(TURNS) for question, answers in turns for answer in answers
        ])  # fmt: skip
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_gradients_are_those_of_the_folded_product(language, tokenizer):
    reader = shaken_reader(language, tokenizer)
    layer = reader.layers[1]
    x = torch.randn(2, 5, 24, requires_grad=True)
    weights = torch.randn(2, 5, layer.down.shape[1], requires_grad=True), torch.randn(2, 5, 24)
    (layer.product("down", weights[0]) * weights[1]).sum().backward()
    found = weights[0].grad.clone(), layer.down_a.grad.clone(), layer.down_b.grad.clone()
    for tensor in (weights[0], layer.down_a, layer.down_b):
        tensor.grad = None
    whole = layer.down + 2.0 * layer.down_b @ layer.down_a
    ((weights[0] @ whole.T) * weights[1]).sum().backward()
    for got, tensor in zip(found, (weights[0], layer.down_a, layer.down_b), strict=True):
        torch.testing.assert_close(got, tensor.grad, atol=1e-4, rtol=1e-4)
    assert x.grad is None


def test_padding_changes_nothing(language, tokenizer):
    reader = shaken_reader(language, tokenizer)
    visual = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(2))
    rows = [pack(turns, tokenizer) for turns in TURNS]
    alone = torch.cat([reader(visual[i : i + 1], collate([row])) for i, row in enumerate(rows)])
    torch.testing.assert_close(reader(visual, collate(rows)), alone, atol=1e-4, rtol=1e-4)


def test_the_layout_is_that_of_the_chat_template(tokenizer):
    row = pack([("Why?", ["So."])], tokenizer)
    assert tokenizer.decode(row.ids) == "Why?<|im_end|>\n<|im_start|>assistant\nSo."
    assert tokenizer.decode(row.targets) == "So.<|im_end|>"
    assert row.positions.tolist() == list(range(len(row.ids)))
