"""Peak memory of a call and FLOPs of a module, as torch counts them."""

import os
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Call ``run`` and return the most bytes that its tensors held at a time, beyond those that were there before.

    On a GPU this is the allocator's own record; on the CPU every allocation of torch's allocator is counted by the
    profiler. Both leave out what kernels take past the allocator, and memory that is held but unused.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its start-up notice calls a machine without a GPU an error
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return int(most)


def flop_counter() -> FlopCounterMode:
    """Torch's FLOP counter, with the attention kernel of CPUs, which torch 2.14 does not count."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops})


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Of two products: queries with keys, weights with values; a query head each, whatever heads share keys."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


class ModuleFlops:
    """Counts the FLOPs of a module's calls while the ``with`` block lasts.

    Attributes:
        total: Multiply-adds count as 2.
        later: Of calls during the second and further calls of ``model``, which are not in the total: decode steps.
    """

    def __init__(self, module: nn.Module | None, model: nn.Module | None = None) -> None:
        """Prepare to count; no module makes no FLOPs."""
        self.module, self.model, self.total, self.later, self.passes = module, model, 0, 0, 0

    def __enter__(self) -> "ModuleFlops":
        self.handles = []
        if self.module is not None:
            self.handles = [
                self.module.register_forward_pre_hook(self._begin, prepend=True),
                self.module.register_forward_hook(self._end, always_call=True),  # also after an error
            ]
        if self.model is not None:
            self.handles.append(self.model.register_forward_pre_hook(self._pass, prepend=True))
        return self

    def _pass(self, *_: object) -> None:
        self.passes += 1

    def _begin(self, *_: object) -> None:
        self.counter = flop_counter()
        self.counter.__enter__()

    def _end(self, *_: object) -> None:
        self.counter.__exit__(None, None, None)
        flops = self.counter.get_total_flops()
        self.total += flops if self.passes < 2 else 0
        self.later += flops if self.passes > 1 else 0

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
