"""Looking back by changing hidden states: a reducer of one's own, in one layer."""

import torch
from families import build
from shortening import compact

from lit_reduce.recall import RecallReducer
from lit_reduce.reducer import create
from lit_reduce.runtime import attach, encode
from lit_reduce.runtime.encode import placeholders

KEEP = 5


class Third(RecallReducer):
    """What a package of its own would write: the short stream reads the mean of the picture again."""

    name, reads = "third", "tokens"

    def recalls(self, depth):
        return [depth - 1]

    def reduce(self, tokens, keep):
        out = create("pool").reduce(tokens, keep)
        return type(out)(out.kept_indices, out.features, assignment=out.assignment, memory=tokens.features)

    def recall(self, look):
        return look.hidden + look.memory.mean(1, keepdim=True)


@torch.no_grad()
def test_hidden_states_are_changed_before_a_layer_and_nowhere_else():
    tiny = build("llava_next")
    seen = {}
    layers = tiny.model.get_decoder().layers
    short = encode(tiny.model, tiny.inputs)
    prompt, _ = compact(tiny.model, tiny.inputs, short, create("pool"), KEEP)
    wanted = torch.zeros(*prompt["input_ids"].shape, 32)
    means = torch.stack([x.mean(0) for x in short.features])
    wanted[placeholders(tiny.model, prompt["input_ids"])] = means.repeat_interleave(KEEP, 0)
    for name, reducer in (("pool", create("pool")), ("third", Third())):
        with attach(tiny.model, reducer, keep=KEEP):
            handle = layers[4].register_forward_pre_hook(lambda _, args, at=name: seen.update({at: args[0]}))
            out = tiny.model(**tiny.inputs)
        handle.remove()
        seen[name + " logits"] = out.logits
    torch.testing.assert_close(seen["third"] - seen["pool"], wanted, atol=1e-5, rtol=0)
    assert float((seen["third logits"] - seen["pool logits"]).abs().max()) > 0.1
