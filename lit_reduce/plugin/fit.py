"""Comparing weights with the module that a config describes, before memory for that module is taken."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from lit_reduce.reducer import Reducer, ReducerConfig

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_fit(cls: type[Reducer], config: ReducerConfig, state: Mapping[str, Tensor]) -> None:
    """Build the reducer on the meta device, which takes no memory, and compare names, shapes and dtypes.

    Raises:
        ValueError: They differ, or the floating weights have no common dtype that layers compute in.
        RuntimeError: The module cannot be built.
    """
    try:
        with torch.device("meta"), _at_most(2 * len(state) + 64):
            reducer = cls(config)
    except RuntimeError as error:
        if "meta" in str(error):  # a constructor that reads values of its tensors: only the real one can tell
            return
        raise
    for name, tensor in reducer.state_dict().items():
        if name in state and state[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {state[name].dtype}, where {tensor.dtype} is meant")
    reducer.load_state_dict(state, strict=True, assign=True)  # compares names and shapes
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"the weights are {names}; all must be one of float32, bfloat16, float16, float64")


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stop a constructor that makes many more weights than there are: a config may ask for billions of layers."""
    made = 0

    def step(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > count:
            raise ValueError("the config describes more weights than there are")

    hook: Any = register_module_parameter_registration_hook(step)
    try:
        yield
    finally:
        hook.remove()
