"""Made-up visual tokens with every signal that a reducer may ask for."""

import zlib
from collections.abc import Callable

import pytest
import torch

from lit_reduce.reducer import Reducer
from lit_reduce.tokens import VisualTokens

WIDTH, TOWER, TEXT = 6, 8, 5


def made_tokens(
    reducer: Reducer,
    batch: int = 3,
    grid: tuple[int, int, int] = (1, 4, 6),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    extra: int = 0,
) -> VisualTokens:
    """Random tokens; attention is positive and uneven, and prompts have unequal lengths."""
    count = grid[0] * grid[1] * grid[2] + extra

    def draw(name: str, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{seed}".encode()))
        return torch.randn(batch, *shape, generator=generator)

    lengths = torch.arange(batch) % TEXT + 1
    mask = torch.arange(TEXT) < lengths[:, None]
    signals: dict[str, torch.Tensor] = {}
    for name in reducer.signals:
        kind = name.partition("@")[0]
        if kind in ("cls", "received", "last", "history"):
            signals[name] = (2 * draw(name, count)).softmax(-1)
        elif kind == "image_rows":
            signals[name] = (2 * draw(name, 7, count)).softmax(-1)
        elif kind == "place":
            signals[name] = torch.arange(count).expand(batch, -1)
        elif kind == "gate":
            signals[name] = torch.ones(batch, count)
        elif kind == "text_rows":
            share = draw(f"{name} share", TEXT, 1).sigmoid() * mask[..., None]  # words look at other words too
            signals[name] = (2 * draw(name, TEXT, count)).softmax(-1) * share
        elif kind == "text":
            signals[name] = draw(name, TEXT, WIDTH) * mask[..., None]
        elif kind in ("cls_query", "cls_value"):
            signals[name] = draw(name, TOWER)
        elif kind in ("keys", "queries", "values", "encoder"):
            signals[name] = draw(name, count, TOWER)
        elif kind == "size":
            signals[name] = draw(name, count).abs() + 1
        elif kind != "text_mask":
            raise AssertionError(f"no test makes the signal {name}")
    signals = {name: x.to(dtype) if x.is_floating_point() else x for name, x in signals.items()}
    if {"text", "text_rows"} & set(signals):
        signals["text_mask"] = mask
    layer = -1 if reducer.site == "projector" else 1
    return VisualTokens(draw("features", count, WIDTH).to(dtype), grid, signals, layer)


@pytest.fixture
def made() -> Callable[..., VisualTokens]:
    return made_tokens
