"""``lit-reduce bench``: count and time what a reducer saves and costs."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lit_reduce import settings as files
from lit_reduce.backbones import load_backbone
from lit_reduce.benchmark.bench import bench, named_spec
from lit_reduce.benchmark.machine import machine_facts
from lit_reduce.commands.logs import quiet_transformers
from lit_reduce.errors import UserError
from lit_reduce.files import check_writable, write_atomic
from lit_reduce.inference.spec import ReducerSpec, find_spec
from lit_reduce.plugin import check_backbone
from lit_reduce.reducer import available
from lit_reduce.report.bench_table import bench_table
from lit_reduce.settings.bench import BenchSettings
from lit_reduce.tokens import Budget


def main(argv: Sequence[str]) -> None:
    """Run the command on the words behind its name."""
    settings = files.resolve(BenchSettings, argv, files.configs_dir(), "bench")
    quiet_transformers()
    run(settings)


def run(settings: BenchSettings) -> None:
    """Count and measure every budget at every batch size; writes JSON, prints a table.

    Raises:
        UserError: A setting, the backbone or the reducer is not usable.
    """
    files.check(settings)
    keeps = [Budget.parse(keep).value for keep in _listed(settings.keep)]
    batches = _listed(settings.batch)
    for batch in batches:
        if not isinstance(batch, int):
            raise UserError(f"batch={batch} is not a number of prompts: give whole numbers, as batch=[1,4]")
    out = Path(settings.out)
    if out.suffix != ".json":
        raise UserError(f"out={out}: the report is JSON, so give a name that ends in .json")
    check_writable(out)
    early = settings.reducer.name in available() or find_spec(settings.reducer, keeps[0])
    backbone = load_backbone(
        settings.backbone.name, settings.backbone.dtype, settings.backbone.device, settings.backbone.revision
    )
    backbone.model.generation_config.eos_token_id = None  # every run makes as many tokens as it was asked for
    if settings.clock == "cpu" and backbone.model.device.type != "cpu":
        raise UserError("clock=cpu counts the processor's own time, but the model runs on a GPU; use clock=wall")
    spec = early if isinstance(early, ReducerSpec) else named_spec(settings.reducer, backbone)
    if spec.trained_for is not None:
        check_backbone(spec.trained_for, backbone.identity)
    count = 1 + len(keeps) if spec.reducer is not None else 1
    report: dict[str, Any] = {**machine_facts(backbone), **asdict(settings), "rows": []}
    with tqdm(total=len(batches) * count * (1 + settings.runs), unit="run", desc="bench") as bar:
        for batch in batches:
            report["rows"] += bench(backbone, spec, keeps, batch, settings, bar.update)
            write_atomic(out, json.dumps(report, indent=2) + "\n")  # a killed run keeps the sizes that are done
    files.save(settings, files.beside(out))
    print(bench_table(report), end="")
    print(f"report: {out}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
