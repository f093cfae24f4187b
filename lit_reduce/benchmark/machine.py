"""The machine and the versions of a measurement: a time means nothing without them."""

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from lit_reduce.backbones import Backbone


def machine_facts(backbone: Backbone) -> dict[str, Any]:
    """Date, machine, versions, number format and attention kernel of a measurement on this backbone."""
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
        "flops": "multiply-add = 2; see lit_reduce/benchmark/flops.py for what is left out",
    }


def _processor() -> str:
    """The name of the CPU, where the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
