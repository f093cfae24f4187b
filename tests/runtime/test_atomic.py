"""Attaching is all or nothing: whatever interrupts it, at whichever step, leaves the model exactly as it was."""

import sys

import pytest
import torch
from families import build
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_reduce.backbones.identity import identify
from lit_reduce.errors import UserError
from lit_reduce.plugin import create_for
from lit_reduce.runtime import attach, patches

REMEMBER = {"levels": [2], "layers": [2]}
FALCON = {"blocks": 3, "rank": 2, "reatten": 0, "table": 3}
CASES = {
    "projector": ("qwen3_vl", [("grid", {})], 4),
    "encoder": ("llava", [("tome", {})], 12),
    "encoder, given back": ("smolvlm", [("evit", {})], 16),
    "encoder, packed": ("qwen3_vl", [("evit", {})], 4),
    "encoder, registers": ("llava_next", [("falcon", FALCON)], 5),
    "decoder": ("qwen3_vl", [("pyramiddrop", {})], 4),
    "decoder, skip": ("internvl", [("mod", {})], 4),
    "decoder, registers": ("llava", [("voco", {"tokens": 4, "key_size": 16})], 3),
    "cache": ("gemma3", [("lookm", {})], 3),
    "recall of tokens": ("llava", [("remember", REMEMBER)], 5),
    "recall of attention": ("qwen2_5_vl", [("flexattention", {"key_size": 16, "first": 2})], 4),
    "all": ("paligemma", [("evit", {}), ("grid", {}), ("pyramiddrop", {}), ("lookm", {})], [20, 9, 5, 3]),
}


class Interrupt(BaseException):
    """As Ctrl-C: no handler of ordinary errors catches it."""


def parts(model):
    """All attributes of all modules, in containers by their contents; and the attention functions."""

    def mark(x):
        return [(key, id(value)) for key, value in x.items()] if isinstance(x, dict) else id(x)

    modules = [(type(m), {name: mark(x) for name, x in vars(m).items()}) for m in model.modules()]
    return modules, {name: id(x) for name, x in dict(ALL_ATTENTION_FUNCTIONS).items()}


def logits(tiny):
    with torch.no_grad():
        return tiny.model(**tiny.inputs).logits


def made(tiny, named):
    identity = identify(tiny.model)
    return [create_for(identity, name, options).eval() for name, options in named]


def interrupted_at(step, run):
    """Call ``run`` and interrupt it before the line number ``step`` that it executes of `patches`; false if it ends."""
    left, before = step, sys.gettrace()

    def line(frame, event, _):
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(before)
                raise Interrupt
        return line

    def trace(frame, event, _):
        return line if frame.f_code.co_filename == patches.__file__ else None

    try:
        sys.settrace(trace)
        run()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("case", CASES)
def test_an_interrupt_at_any_step_leaves_the_model_as_it_was(case):
    family, named, keep = CASES[case]
    tiny = build(family)
    reducers, expected = made(tiny, named), logits(tiny)
    before, step, attached = parts(tiny.model), 1, []
    while interrupted_at(step, lambda: attached.append(attach(tiny.model, reducers, keep=keep))):
        assert parts(tiny.model) == before, step
        step += 1
    assert step > 20
    assert parts(tiny.model) != before
    attached[0].detach()
    assert parts(tiny.model) == before
    assert torch.equal(logits(tiny), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_leaves_the_model_as_it_was(case):
    family, named, keep = CASES[case]
    tiny = build(family)
    reducers, expected = made(tiny, named), logits(tiny)
    compiled = torch.compile(tiny.model, backend="eager")
    before = parts(tiny.model)
    with pytest.raises(UserError, match="the transformers model itself"):
        attach(compiled, reducers, keep=keep)
    with pytest.raises(UserError):
        attach(tiny.model, reducers, keep=keep, positions="odd")
    with pytest.raises(UserError):
        attach(tiny.model, [*reducers, *reducers], keep=4)
    assert parts(tiny.model) == before
    assert torch.equal(logits(tiny), expected)


@pytest.mark.parametrize("method", ["set", "pop", "pre_hook", "hook", "replace_forward"])
def test_a_step_that_is_not_noted_is_noticed(method, monkeypatch):
    """A test of the test: without its note, a change stays behind."""
    right = getattr(patches.Patches, method)

    def forgetful(self, *args, **kwargs):
        noted = list(self._undo)
        right(self, *args, **kwargs)
        self._undo[:] = noted

    case = {"replace_forward": "encoder", "hook": "decoder", "pop": "all", "set": "projector"}.get(method, "decoder")
    family, named, keep = CASES[case]
    tiny = build(family)
    vars(tiny.model)["_compiled_call"] = object()
    before = parts(tiny.model)
    monkeypatch.setattr(patches.Patches, method, forgetful)
    attach(tiny.model, made(tiny, named), keep=keep).detach()
    assert parts(tiny.model) != before
