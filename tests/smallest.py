"""The learned reducers of the register, each with the settings that it calls its smallest: rows of the shared tests.

``from smallest import LEARNED, smallest`` (pytest puts tests/ on the path). A learned reducer that does not set
`Reducer.smallest` fails `tests/reducers/test_matrix.py`.
"""

import dataclasses
from typing import Any

import torch

from lit_reduce.backbones.identity import identify
from lit_reduce.backbones.towers import tower_of
from lit_reduce.reducer import Reducer, available, find

LEARNED = [name for name, cls in available().items() if cls.trained and cls.__module__.startswith("lit_reduce.")]


def smallest(name: str, sizes: dict[str, Any], **options: Any) -> Reducer:
    """A reducer with the sizes that it has fields for, in evaluation mode; equal for equal arguments."""
    cls = find(name)
    own = {entry.name for entry in dataclasses.fields(cls.config_class)}
    changes = {key: value for key, value in sizes.items() if key in own} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return cls(dataclasses.replace(cls.smallest or cls.config_class(), **changes)).eval()


def sizes_of(model: Any) -> dict[str, Any]:
    """What a reducer has to know of a model: widths, depths, and the widths of queries and keys over all heads."""
    text, identity = model.config.get_text_config(), identify(model)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {
        "hidden_size": identity.hidden_size,
        "vision_hidden_size": identity.vision_hidden_size,
        "depth": identity.depth,
        "query_size": text.num_attention_heads * head,
        "key_size": text.num_key_value_heads * head,
        "blocks": tower_of(model).depth,
    }


def shake(reducer: Reducer, scale: float, seed: int = 0) -> Reducer:
    """Every weight random: what a fresh reducer leaves at zero would hide what it does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in reducer.parameters():
            weight.normal_(0, scale, generator=generator)
    return reducer
