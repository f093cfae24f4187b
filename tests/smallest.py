"""The learned reducers of the register, each with the options that it calls its smallest: rows of the shared tests.

``from smallest import LEARNED, smallest`` (pytest puts tests/ on the path). A learned reducer without `Reducer.smallest`
fails `tests/reducers/test_matrix.py`.
"""

from typing import Any

import torch

from lit_reduce.backbones.towers import tower_of
from lit_reduce.reducer import Reducer, available, create, find

LEARNED = [name for name, cls in available().items() if cls.trained and cls.__module__.startswith("lit_reduce.")]


def smallest(name: str, sizes: dict[str, Any], **options: Any) -> Reducer:
    """A reducer with the sizes that it has fields for, in evaluation mode; equal for equal arguments."""
    cls = find(name)
    fields = cls.config_class.__dataclass_fields__
    fitting = {key: value for key, value in sizes.items() if key in fields}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return create(name, **{**fitting, **(cls.smallest or {}), **options}).eval()


def sizes_of(model: Any) -> dict[str, Any]:
    """What a reducer has to know of a model: widths, depths, and the widths of queries and keys over all heads."""
    text, tower = model.config.get_text_config(), tower_of(model)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {
        "hidden_size": text.hidden_size,
        "vision_hidden_size": getattr(model.config.vision_config, "hidden_size", 0),
        "depth": text.num_hidden_layers,
        "query_size": text.num_attention_heads * head,
        "key_size": text.num_key_value_heads * head,
        "blocks": tower.depth,
    }


def shake(reducer: Reducer, scale: float, seed: int = 0) -> Reducer:
    """Every weight random: what a fresh reducer leaves at zero would hide what it does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in reducer.parameters():
            weight.normal_(0, scale, generator=generator)
    return reducer
