"""Looking back at pictures, against a model that is run on everything at once and attends key by key."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from families import FAMILIES as EVERY
from families import VIDEO_FAMILIES, build, one
from shortening import compact
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from lit_reduce.backbones.identity import identify
from lit_reduce.errors import UserError
from lit_reduce.plugin import create_for
from lit_reduce.runtime import attach, encode
from lit_reduce.runtime.recall import hooks as looked

KEEP, TOLERANCE = 5, 1e-4
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def gap(a, b) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


def looking(model, gate=0.04, **options):
    """A reducer whose maps are random, and whose gates are neither shut nor open."""
    config = model.config.get_text_config()
    width = config.num_key_value_heads * (getattr(config, "head_dim", None) or 8)
    torch.manual_seed(3)
    options = {"rank": 6, "first": 2, "key_size": width, **options}
    reducer = create_for(identify(model), "flexattention", options).eval()
    for weight in reducer.parameters():
        weight.normal_(0, 0.6)
    reducer.gates.copy_(torch.linspace(gate, 2 * gate, len(reducer.gates)))
    return reducer


class Everything:
    """The reference: no cache, plain eager attention, and for each asking token a loop over every single key.

    The bank, its positions and the choice are made anew from the full prompt, one sample and one picture at a time.
    """

    def __init__(self, tiny, reducer, keep, answers):
        self.tiny, self.reducer, self.model, self.lm = tiny, reducer, tiny.model, tiny.model.get_decoder()
        ids = tiny.inputs["input_ids"]
        encoded = encode(self.model, tiny.inputs, reducer.signals)
        self.short, _ = compact(self.model, tiny.inputs, encoded, reducer, keep)
        places = self.model._prepare_position_ids_for_generation(ids, dict(tiny.inputs))
        rotary = places if places.ndim == 2 else places[1:]
        cos, sin = self.lm.rotary_emb(encoded.features[0], rotary)
        self.bank = [[] for _ in ids]  # for each sample (column of its cell in the short prompt, code, cos, sin)
        seen = [0] * len(ids)
        for i, x in enumerate(encoded.features):
            row = encoded.samples[i]
            reduction = reducer(encoded.tokens([i], reducer.signals), min(keep, len(x)))
            full = (ids[row] == tiny.token).nonzero()[:, 0]
            kept = (self.short["input_ids"][row] == tiny.token).nonzero()[:, 0]
            before = sum(len(encoded.features[j]) for j in range(i) if encoded.samples[j] == row)
            for n in range(len(x)):
                cell = kept[seen[row] + int(reduction.assignment[0, n])]
                at = full[before + n]
                self.bank[row].append((int(cell), reduction.memory[0, n], cos[row, at], sin[row, at]))
            seen[row] += min(keep, len(x))
        self.end = self.short["input_ids"].shape[1] - 1
        self.answers, self.rows = answers, {}

    def attention(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        if attention_mask is None:
            attention_mask = torch.full(key.shape[2:3] * 2, -torch.inf).triu(1)[None, None]
        if attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros(()).masked_fill(~attention_mask, -torch.inf)
        groups = query.shape[1] // key.shape[1]
        wide, heavy = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = query @ wide.transpose(2, 3) * scaling + attention_mask
        out = logits.softmax(-1) @ heavy
        layer, layers = module.layer_idx, list(self.reducer.recalls(5))
        for b in range(len(query)):
            for q in range(self.end, query.shape[2]):
                paid = logits[b, :, q].softmax(-1).mean(0)
                if layer in layers:
                    self._ask(module, layers.index(layer), b, q, query, logits, heavy, out, scaling)
                self.rows[layer, b, q] = torch.stack([paid[cell] for cell, *_ in self.bank[b]])
        return out.transpose(1, 2), None

    def _ask(self, module, number, b, q, query, logits, heavy, out, scaling):
        turn = sys.modules[type(module).__module__].apply_rotary_pos_emb
        row = self.rows[module.layer_idx - 1, b, q]
        least, most = row.min(), row.max()
        many, heads = query.shape[1], self.reducer.heads[number]
        gate = torch.tanh(20 * self.reducer.gates[number])
        for h in range(many):
            scores, values = [*logits[b, h, q]], [*heavy[b, h]]
            for n, (_, code, cos, sin) in enumerate(self.bank[b]):
                if (row[n] - least) / (most - least) <= self.reducer.config.threshold:
                    continue
                key, value = heads(code).chunk(2)
                group = h // (many // (len(key) // query.shape[3]))
                key, value = (x.view(-1, query.shape[3])[group] for x in (key, value))
                key = turn(key[None, None, None], key[None, None, None], cos[None, None], sin[None, None])[1][0, 0, 0]
                scores.append(query[b, h, q] @ key * scaling)
                values.append(value)
            joint = torch.stack(scores).softmax(0) @ torch.stack(values)
            out[b, h, q] = (1 - gate) * out[b, h, q] + gate * joint

    def logits(self):
        """Of the last token of the prompt and of each answer token, as ``generate`` gives them."""
        AttentionInterface.register("test_everything", self.attention)
        AttentionMaskInterface.register("test_everything", eager_mask)
        before = self.lm.config._attn_implementation
        self.lm.set_attn_implementation("test_everything")
        short = dict(self.short)
        many = self.answers.shape[1]
        for name, x in list(short.items()):
            if name in ("input_ids", "attention_mask") or name.endswith("type_ids"):
                ones = torch.full_like(self.answers, name == "attention_mask")
                more = self.answers if name == "input_ids" else ones
                short[name] = torch.cat([x, more.to(x)], 1)
        # Decoding counts on behind the text's positions.
        last = self.short["position_ids"][..., -1:]
        short["position_ids"] = torch.cat([self.short["position_ids"], last + torch.arange(1, many + 1)], -1)
        try:
            return self.model(**short, use_cache=False).logits[:, -many - 1 : -1]
        finally:
            self.lm.set_attn_implementation(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_back_equals_one_softmax_over_every_key(family):
    """Prefill and each decode step; left padding, one and two pictures, grouped heads, unequal choices."""
    tiny = build(family)
    reducer, how = looking(tiny.model), GREEDY | {"suppress_tokens": [100, 101]}  # answers must not look like pictures
    with attach(tiny.model, "pool", keep=KEEP):
        pooled = tiny.model.generate(**tiny.inputs, **how)
    with attach(tiny.model, reducer, keep=KEEP) as attached:
        out = tiny.model.generate(**tiny.inputs, **how)
    assert attached.stats.kept == 15
    assert gap(out, pooled) > 0.1
    answers = out.sequences[:, tiny.inputs["input_ids"].shape[1] :]
    expected = Everything(tiny, reducer, KEEP, answers).logits()
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, expected[:, step], atol=TOLERANCE, rtol=0)


def unturned(attention, keys, cos, sin):
    return keys


def elsewhere(self, memory, rotary):
    pictures = [replace(entry, positions=entry.positions + 2) for entry in memory.pictures]
    laid(self, replace(memory, pictures=pictures), rotary)


def other_cells(self, memory, rotary):
    laid(self, memory, rotary)
    self.column = self.column.roll(3, 1)


def all_ask(self, bank, fresh=0):
    return reading(self, replace(bank, start=bank.start * 0), fresh)


laid, reading = looked.PaddedMemory.__init__, looked.RecallHooks.reading
WRONG = {
    "keys not turned": ("rotated", unturned),
    "keys of other places": ("PaddedMemory.__init__", elsewhere),
    "ranked by other cells": ("PaddedMemory.__init__", other_cells),
    "every token asks": ("RecallHooks.reading", all_ask),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_reference_notices_what_is_wrong(name, monkeypatch):
    place, wrong = WRONG[name]
    owner, _, attribute = place.rpartition(".")
    monkeypatch.setattr(getattr(looked, owner) if owner else looked, attribute, wrong)
    with pytest.raises(AssertionError, match="not close"):
        test_looking_back_equals_one_softmax_over_every_key("llava")


@pytest.mark.parametrize(
    "how",
    [{"cache_implementation": "static"}, {"use_cache": False}, {"attn": "eager"}],
    ids=["static", "no-cache", "eager"],
)
def test_modes_of_generate(how):
    tiny = build("qwen2_5_vl")
    reducer, how = looking(tiny.model), dict(how)
    with attach(tiny.model, reducer, keep=KEEP):
        expected = tiny.model.generate(**tiny.inputs, **GREEDY)
    if kernel := how.pop("attn", None):
        tiny.model.set_attn_implementation(kernel)
    with attach(tiny.model, reducer, keep=KEEP):
        assert gap(tiny.model.generate(**tiny.inputs, **GREEDY, **how), expected) < TOLERANCE


def test_beams_equal_the_same_search_without_a_cache():
    tiny = build("llava")
    with attach(tiny.model, looking(tiny.model), keep=KEEP):
        out = tiny.model.generate(**tiny.inputs, **GREEDY, num_beams=3, num_return_sequences=2)
        expected = tiny.model.generate(**tiny.inputs, **GREEDY, num_beams=3, num_return_sequences=2, use_cache=False)
    assert torch.equal(out.sequences, expected.sequences)
    assert gap(out, expected) < TOLERANCE


def test_guesses_are_checked_as_they_would_be_made():
    tiny = build("llava")
    inputs = one(tiny)
    with attach(tiny.model, looking(tiny.model), keep=KEEP):
        expected = tiny.model.generate(**inputs, **GREEDY)
        out = tiny.model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2)
    assert torch.equal(out.sequences, expected.sequences)
    assert gap(out, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_batch_equals_its_samples(family):
    tiny = build(family)
    for options in ({}, {"share": 0.3}):
        with attach(tiny.model, looking(tiny.model, **options), keep=KEEP):
            together = tiny.model.generate(**tiny.inputs, **GREEDY)
            for row in range(2):
                alone = tiny.model.generate(**one(tiny, row), **GREEDY)
                for a, b in zip(together.logits, alone.logits, strict=True):
                    torch.testing.assert_close(a[row], b[0], atol=TOLERANCE, rtol=0)


def test_a_second_turn_looks_back_at_the_pictures_that_its_cache_knows():
    tiny = build("llava")
    other = tiny.inputs | {"pixel_values": tiny.inputs["pixel_values"].flip(0)}
    more = torch.tensor([[11, 12, 13], [14, 15, 16]])
    with attach(tiny.model, looking(tiny.model), keep=KEEP):
        first = tiny.model.generate(**tiny.inputs, **GREEDY)
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.nn.functional.pad(tiny.inputs["attention_mask"], (0, 7), value=1)
        whole = {"attention_mask": mask, "use_cache": True}
        cache = copy.deepcopy(first.past_key_values)
        tiny.model.generate(**other, **GREEDY)  # what is read in between is another cache's business
        out = tiny.model.generate(ids, **whole, past_key_values=cache, **GREEDY)
        expected = conversation(tiny, ids, mask)
    assert gap(out, expected) < TOLERANCE


def conversation(tiny, ids, mask):
    """Turn by turn, tokens of the second question fed one by one without looking back but for the last."""
    recalling = vars(tiny.model)["_lit_reduce"].session.handlers[0].hooks
    first = tiny.model.generate(**tiny.inputs, **GREEDY)
    cache = first.past_key_values
    done = first.sequences.shape[1] - 1
    layers, recalling.layers = recalling.layers, frozenset()
    for column in range(done, ids.shape[1] - 1):
        tiny.model(ids[:, column : column + 1], attention_mask=mask[:, : column + 1], past_key_values=cache)
    recalling.layers = layers
    logits, token = [], ids[:, -1:]
    for step in range(4):
        seen = torch.nn.functional.pad(mask, (0, step), value=1)
        logits.append(tiny.model(token, attention_mask=seen, past_key_values=cache).logits[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
    first.logits = tuple(logits)
    return first


def test_keeping_all_and_shut_gates_are_the_plain_model_and_the_short_stream_to_the_bit():
    tiny = build("llava")
    plain = tiny.model.generate(**tiny.inputs, **GREEDY)
    with attach(tiny.model, looking(tiny.model), keep=1.0):
        assert gap(tiny.model.generate(**tiny.inputs, **GREEDY), plain) == 0
    with attach(tiny.model, "pool", keep=KEEP):
        pooled = tiny.model.generate(**tiny.inputs, **GREEDY)
    with attach(tiny.model, looking(tiny.model, gate=0), keep=KEEP):
        assert gap(tiny.model.generate(**tiny.inputs, **GREEDY), pooled) == 0
    assert gap(tiny.model.generate(**tiny.inputs, **GREEDY), plain) == 0


def test_training_reaches_the_reducer_alone_and_equals_decoding():
    tiny = build("llava")
    reducer = looking(tiny.model)
    with attach(tiny.model, reducer, keep=KEEP):
        out = tiny.model.generate(**tiny.inputs, **GREEDY)
    answer = out.sequences[:, -4:]
    inputs = {k: v for k, v in tiny.inputs.items() if k not in ("input_ids", "attention_mask")}
    inputs["input_ids"] = torch.cat([tiny.inputs["input_ids"], answer], 1)
    inputs["attention_mask"] = torch.nn.functional.pad(tiny.inputs["attention_mask"], (0, 4), value=1)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-4] = -100
    tiny.model.requires_grad_(False)
    with torch.enable_grad(), attach(tiny.model, reducer.requires_grad_(), keep=KEEP):
        result = tiny.model(**inputs, use_cache=False)
        result.loss.backward()
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(result.logits[:, step - 5], logits, atol=TOLERANCE, rtol=0)
    assert all(weight.grad.abs().max() > 1e-6 for weight in reducer.parameters())
    # The gradient of a gate, against the difference that the gate makes.
    losses = []
    for by in (1e-3, -1e-3):
        reducer.gates[1] += by
        with attach(tiny.model, reducer, keep=KEEP):
            losses.append(float(tiny.model(**inputs, use_cache=False).loss))
        reducer.gates[1] -= by
    assert abs((losses[0] - losses[1]) / 2e-3 - float(reducer.gates.grad[1])) < 0.02 * abs(float(reducer.gates.grad[1]))


@pytest.mark.parametrize("name", ["flexattention", "remember"])
@pytest.mark.parametrize("family", [*EVERY, *VIDEO_FAMILIES])
def test_every_family_looks_back_or_says_why_not(family, name):
    """Shut, a gate leaves the short stream as it is, to the bit; open, it does not; a batch equals its samples."""
    tiny = build(family)
    if name == "flexattention":
        if family == "gemma3":
            with pytest.raises(UserError, match="slide out of its window"):
                attach(tiny.model, looking(tiny.model), keep=0.4)
            return
        reducer = looking(tiny.model)
        gates = [reducer.gates]
    else:
        inner = {"short": "pool", "width": 16, "levels": [0.5, -1]}
        reducer = create_for(identify(tiny.model), name, inner).eval()
        torch.manual_seed(0)
        gates = [read.gate for read in reducer.reads_again]
        for read in reducer.reads_again:
            read.leave.weight.normal_(0, 0.5)
    found = {}
    for gate in (0.04, 0.0):
        for one_gate in gates:
            one_gate.fill_(gate)
        with attach(tiny.model, reducer, keep=0.4):
            found[gate] = tiny.model(**tiny.inputs).logits
            if gate:
                alone = tiny.model(**one(tiny, 1)).logits[0, -1]
    with attach(tiny.model, "pool", keep=0.4) as attached:
        pooled = tiny.model(**tiny.inputs).logits
    seen = attached.prompt_map.selected
    assert torch.equal(found[0.0][seen], pooled[seen])
    assert float((found[0.04] - pooled)[:, -1].abs().max()) > 0.05
    torch.testing.assert_close(found[0.04][1, -1], alone, atol=TOLERANCE, rtol=0)


def test_what_cannot_be_right_is_refused():
    tiny = build("llava")
    reducer = looking(tiny.model)
    with pytest.raises(UserError, match="attach it alone"):
        attach(tiny.model, [reducer, "fastv"], keep=4)
    with pytest.raises(UserError, match="leave positions=keep"):
        attach(tiny.model, reducer, keep=4, positions="renumber")
    with pytest.raises(UserError, match="looks back in layers none"):
        attach(tiny.model, looking(tiny.model, first=5), keep=4)
    with pytest.raises(UserError, match="slide out of its window"):
        attach(build("gemma3").model, looking(tiny.model), keep=4)
    with attach(tiny.model, looking(tiny.model, key_size=32), keep=4), pytest.raises(UserError, match="key_size=16"):
        tiny.model(**tiny.inputs)
    with attach(tiny.model, reducer, keep=4):
        with pytest.raises(UserError, match="prefill_chunk_size"):
            tiny.model.generate(**tiny.inputs, **GREEDY, prefill_chunk_size=8)
        cache = tiny.model(**tiny.inputs, use_cache=True).past_key_values
    step = {"input_ids": torch.tensor([[5], [6]]), "past_key_values": cache}
    with attach(tiny.model, looking(tiny.model), keep=4), pytest.raises(UserError, match="another reducer wrote"):
        tiny.model(**step)
    assert "_lit_reduce" not in vars(tiny.model)
    for layer in tiny.model.get_decoder().layers:
        assert layer.self_attn.config is tiny.model.get_decoder().config
