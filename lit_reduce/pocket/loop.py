"""The training loop of the recipe: batches are a function of the step, so a killed run goes on as if it never was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lit_reduce.pocket.muon import Muon
from lit_reduce.precision import fast_in_bfloat16

Losses = dict[str, Tensor]


class Steps(Dataset[Any]):
    """Item i is the batch of step i."""

    def __init__(self, make: Callable[[int], Any], first: int, last: int) -> None:
        self.make, self.first, self.last = make, first, last

    def __len__(self) -> int:
        """Returns the number of steps left."""
        return self.last - self.first

    def __getitem__(self, i: int) -> Any:
        """Makes the batch of one step."""
        return self.make(self.first + i)


def batches(make: Callable[[int], Any], first: int, last: int, workers: int) -> Iterator[Any]:
    """Yields the batches of steps first..last-1 in order, made by worker processes ahead of time."""
    loader: DataLoader[Any] = DataLoader(
        Steps(make, first, last), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )
    return iter(loader)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Returns the factor of the learning rate: linear warm-up, then a straight line down to 2 %."""
    return min((step + 1) / warmup, max(0.02, 1 - max(0, step - warmup) / max(1, steps - warmup)))


def fit(
    name: str,
    parts: dict[str, nn.Module],
    make: Callable[[int], Any],
    loss_of: Callable[[Any, int], Losses],
    *,
    steps: int,
    lr: float,
    folder: Path,
    device: torch.device,
    warmup: int = 100,
    weight_decay: float = 0.02,
    every_seconds: float = 90,
    workers: int = 1,
    log_every: int = 25,
    on_log: Callable[[int], dict[str, float]] | None = None,
) -> None:
    """Trains `parts` for `steps` steps, resuming from folder/name.pt when it is there.

    Args:
        name: Of the stage; its checkpoint and its log carry it.
        parts: Modules whose trainable parameters are optimised.
        make: step -> batch, a pure function (runs in a worker process).
        loss_of: (batch, step) -> {"loss": scalar, ...}; everything else in it is logged.
        steps: Total number of steps.
        lr: Peak learning rate, of Muon for matrices inside blocks and of AdamW for the rest.
        folder: Where the checkpoint and the log live.
        device: Where the parts live; computed in bfloat16 where that is faster there.
        warmup: Steps of linear warm-up, a quarter of all steps at most.
        weight_decay: Of matrices; vectors have none.
        every_seconds: Seconds between checkpoints.
        workers: Processes that make batches.
        log_every: Steps between log lines.
        on_log: step -> further figures, called every 20th log line.
    """
    params = [p for part in parts.values() for p in part.parameters() if p.requires_grad]
    params = list({id(p): p for p in params}.values())
    optimizers = optimizers_of(parts, lr, weight_decay)
    path, first, warmup = folder / f"{name}.pt", 0, min(warmup, max(1, steps // 4))
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(state["parts"][key])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        first = int(state["step"])
    if first >= steps:
        return
    bar = tqdm(total=steps, initial=first, desc=name, mininterval=5)
    saved, means = time.monotonic(), dict[str, float]()
    with (folder / f"{name}.log").open("a") as log:
        for step, batch in zip(range(first, steps), batches(make, first, steps, workers), strict=True):
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = group["peak"] * schedule(step, steps, warmup)
            with quick(device):
                losses = loss_of(batch, step)
            for param in params:
                param.grad = None
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            for key, value in losses.items():
                means[key] = 0.95 * means.get(key, float(value.detach())) + 0.05 * float(value.detach())
            bar.update()
            done = step + 1
            if done % log_every == 0 or done == steps:
                more = on_log(done) if on_log and (done % (log_every * 20) == 0 or done == steps) else {}
                line = " ".join(f"{k} {v:.4f}" for k, v in {**means, **more}.items())
                log.write(f"{done} {line}\n")
                log.flush()
                bar.set_postfix_str(f"loss {means['loss']:.3f}")
            if time.monotonic() - saved > every_seconds or done == steps:
                weights = {k: p.state_dict() for k, p in parts.items()}
                save(path, {"parts": weights, "optimizers": [o.state_dict() for o in optimizers], "step": done})
                saved = time.monotonic()
    bar.close()


def quick(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 on machines that are faster in it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast_in_bfloat16(device))


def optimizers_of(parts: dict[str, nn.Module], lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices inside blocks and AdamW for embeddings, read-outs and vectors."""
    named = {id(p): (f"{key}.{name}", p) for key, part in parts.items() for name, p in part.named_parameters()}
    inner = [p for name, p in named.values() if p.requires_grad and p.ndim == 2 and ".layers." in name]
    held = {id(p) for p in inner}
    outer = [p for _, p in named.values() if p.requires_grad and id(p) not in held]
    out: list[torch.optim.Optimizer] = []
    if inner:
        out.append(Muon(inner, lr=lr, weight_decay=weight_decay))
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in outer if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in outer if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=lr, betas=(0.9, 0.98),
    )  # fmt: skip
    out.append(adam)
    for group in (g for optimizer in out for g in optimizer.param_groups):
        group["peak"] = group["lr"]
    return out


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint whole or not at all."""
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(path)
