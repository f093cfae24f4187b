"""Processor time of greedy selection and merging beside the formulae that the papers' code uses.

Each pair is timed in one process, one after the other in turn, on one thread; the ratio is that of the medians of each.
The comparison functions are written here from the papers' formulae, in the order of operations of the official code:
CDPruner for `dpp_greedy`, MMTok (one image after the other) for `coverage`, ToMe's scatter for `merge_mean`.

    python docs/scripts/ops_speed.py [1]  (1: only 576 tokens)
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lit_reduce.ops.greedy import coverage, dpp_greedy
from lit_reduce.ops.mergers import merge_mean
from lit_reduce.ops.similarity import cosine

WIDTH = 1024
SIZES = ((576, 64), (2880, 320))


def paper_dpp(kernel: Tensor, k: int) -> Tensor:
    """Greedy MAP with the update of Chen et al., all images together."""
    batch, count, _ = kernel.shape
    rows = torch.arange(batch)
    gain = torch.diagonal(kernel, dim1=1, dim2=2).clone()
    factors, picks = torch.zeros(k, batch, count), torch.empty(k, batch, dtype=torch.long)
    for i in range(k):
        picks[i] = j = gain.argmax(-1)
        along = torch.einsum("tb,tbn->bn", factors[:i, rows, j], factors[:i])
        factors[i] = (kernel[rows, j] - along) / gain[rows, j].sqrt()[:, None]
        gain -= factors[i].square()
        gain[rows, j] = -torch.inf
    return picks.T.sort(-1).values


def paper_coverage(table: Tensor, k: int) -> Tensor:
    """Greedy facility location on rows of things to cover, image by image."""
    found = []
    for one in table:
        best, taken = torch.zeros(len(one)), torch.zeros(one.shape[1])
        picks = torch.empty(k, dtype=torch.long)
        for i in range(k):
            gain = (one - best[:, None]).clamp_min_(0).sum(0) + taken
            picks[i] = j = gain.argmax()
            taken[j] = -torch.inf
            best = torch.maximum(best, one[:, j])
        found.append(picks.sort().values)
    return torch.stack(found)


def paper_merge(x: Tensor, assignment: Tensor, k: int, weight: Tensor) -> Tensor:
    """Weighted mean by scattered sums."""
    index = assignment[..., None].expand_as(x)
    sums = torch.zeros(len(x), k, x.shape[2]).scatter_reduce_(1, index, x * weight[..., None], "sum")
    return sums / torch.zeros(len(x), k).scatter_reduce_(1, assignment, weight, "sum")[..., None]


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median processor time of ours in milliseconds, and in parts of theirs."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for call, record in zip((ours, theirs), times, strict=True):
            start = time.process_time()
            call()
            record.append(time.process_time() - start)
    mine, other = (statistics.median(record[1:]) for record in times)  # the first round warms up
    return 1000 * mine, mine / other


def main() -> None:
    """Prints a table."""
    torch.set_num_threads(1)
    print("| function | tokens | batch | ms | of the paper's code |\n|---|---:|---:|---:|---:|")
    for count, k in SIZES[: int(sys.argv[1])] if len(sys.argv) > 1 else SIZES:
        for batch in (1, 8):
            draw = torch.Generator().manual_seed(0)
            x = torch.randn(batch, count, WIDTH, generator=draw)
            weight = torch.rand(batch, count, generator=draw) + 0.1
            kernel = weight[:, :, None] * cosine(x) * weight[:, None]
            words = (torch.randn(batch, 20, count, generator=draw) / 0.2).softmax(-1) / 20
            table = torch.cat([words, 0.5 * (cosine(x) / 0.2).softmax(-1) / count], 1)
            assignment = torch.randint(0, k, (batch, count), generator=draw)
            rounds = 9 if count < 1000 else 2
            pairs = {
                "dpp_greedy": (lambda: dpp_greedy(kernel, k), lambda: paper_dpp(kernel, k)),  # noqa: B023
                "coverage": (lambda: coverage(table, k), lambda: paper_coverage(table, k)),  # noqa: B023
                "merge_mean": (
                    lambda: merge_mean(x, assignment, k, weight),  # noqa: B023
                    lambda: paper_merge(x, assignment, k, weight),  # noqa: B023
                ),
            }
            for name, (ours, theirs) in pairs.items():
                elapsed_ms, part = ratio(ours, theirs, rounds)
                print(f"| {name} | {count} | {batch} | {elapsed_ms:.1f} | {part:.2f} |", flush=True)


if __name__ == "__main__":
    main()
