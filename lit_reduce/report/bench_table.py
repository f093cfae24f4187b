"""How a benchmark is told: on which machine it ran, and its figures as a table."""

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from lit_reduce.backbones import Backbone

HEAD = (
    f"{'batch':>5}{'keep':>7}{'first token ms':>17}{'prefill ms [quartiles]':>27}{'speed-up':>10}{'of FLOPs':>10}"
    f"{'decode ms':>11}{'reducer ms':>12}{'share':>7}{'KV MB':>8}{'peak MB':>9}"
)


def about(backbone: Backbone) -> dict[str, Any]:
    """Date, machine and versions: a time means nothing without them."""
    model = backbone.model
    cuda = model.device.type == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(model.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config.get_text_config()._attn_implementation,
        "weights_bytes": sum(weight.nbytes for weight in model.parameters()),
        "memory": "peak of torch's allocator above the weights",
        "flops": "multiply-add = 2; see lit_reduce/evaluate/cost.py for what is left out",
    }


def table(report: dict[str, Any]) -> str:
    """One line for the plain backbone and one for each budget, by batch size.

    ``speed-up`` is the plain prefill over this one, the median over turns; ``of FLOPs`` that over the ratio of the
    FLOPs; ``share`` the reducer's own time over the plain prefill.
    """
    where = [
        report["dtype"],
        report["attention"],
        report["device"],
        f"{report['threads']} threads",
        f"{report['clock']} clock",
    ]
    words = [report["backbone"]["name"], report["reducer"]["name"], *where, report["date"], f"{report['runs']} turns"]
    lines = [", ".join(words), HEAD, "-" * len(HEAD)]
    return "\n".join([*lines, *map(_line, report["rows"])]) + "\n"


def _line(row: dict[str, Any]) -> str:
    prefill, speedup = row["prefill_ms"], row["prefill_speedup"]["median"]
    quartiles = f"{prefill['median']:.1f} [{prefill['low']:.1f}, {prefill['high']:.1f}]"
    return (
        f"{row['batch']:>5}{row['keep']:>7}{row['first_token_ms']['median']:>17.1f}{quartiles:>27}{speedup:>9.2f}x"
        f"{speedup / row['prefill_flop_ratio']:>9.0%} {row['decode_ms']['median']:>10.1f}"
        f"{row['reducer_ms']['median']:>12.2f}{row['reducer_share']:>7.1%}"
        f"{row['kv_bytes'] / 1e6:>8.1f}{row['peak_bytes'] / 1e6:>9.1f}"
    )


def _processor() -> str:
    """The name of the CPU, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
