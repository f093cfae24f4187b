"""Whether a device multiplies matrices faster in bfloat16 than in float32, measured on the device itself."""

import time
from functools import lru_cache

import torch

TRIES = 9
MIN_SPEEDUP = 1.2  # the speed-up from which bfloat16 is worth its rounding


@lru_cache(maxsize=8)
def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether matrix products of a small model's size are clearly faster in bfloat16 than in float32.

    Processors differ: with tile registers bfloat16 is several times as fast, with vector instructions alone it may
    take twice as long. Takes about 50 milliseconds once, on CPUs; other devices answer for themselves.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    pairs = {dtype: (torch.ones(2048, 256, dtype=dtype), torch.ones(256, 704, dtype=dtype))
             for dtype in (torch.float32, torch.bfloat16)}  # fmt: skip
    best = dict.fromkeys(pairs, float("inf"))
    for _ in range(TRIES):
        for dtype, (left, right) in pairs.items():
            start = time.perf_counter()
            torch.mm(left, right)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] > MIN_SPEEDUP * best[torch.bfloat16]
