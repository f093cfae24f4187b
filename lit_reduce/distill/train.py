"""``train``: from settings to an exported plug-in and a table that compares it with the baselines."""

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from lightning import seed_everything
from lightning.pytorch.utilities import rank_zero_only

from lit_reduce.backbones import Backbone, load_backbone, read_config
from lit_reduce.data.groups import Group
from lit_reduce.distill.checks import check, check_backbone, guide_layers, precision_of
from lit_reduce.distill.data import DistillData
from lit_reduce.distill.export import export, write_table
from lit_reduce.distill.initial import initial_reducer
from lit_reduce.distill.logs import quiet
from lit_reduce.distill.lr_finder import show, sweep
from lit_reduce.distill.provenance import run_facts
from lit_reduce.distill.sources import table_rows, training_groups
from lit_reduce.distill.teacher import PIXELS, Teacher
from lit_reduce.distill.trainer import check_checkpoint, fit
from lit_reduce.files import check_writable, locked
from lit_reduce.reducer import Reducer
from lit_reduce.runtime.decoder.attention_rows import from_tower
from lit_reduce.settings import save
from lit_reduce.settings.references import with_references
from lit_reduce.settings.train import TrainSettings

PLUGIN = "plugin"


def train(settings: TrainSettings) -> None:
    """Distil a reducer, export it to ``output/plugin``, compare it with the baselines and print the table.

    A run that was killed goes on from ``output/last.ckpt`` when it is started again with the same settings.

    Raises:
        UserError: A setting, the data or the backbone is not usable, ``output`` is of a run that differs in anything
            that decides the result, or another run is writing it.
    """
    settings = with_references(settings)
    check(settings)
    output = Path(settings.output)
    check_writable(output / "table.json")
    first = getattr(rank_zero_only, "rank", None) in (None, 0)  # the other processes of a run share its lock
    with locked(output / ".lock") if first else nullcontext():
        _train(settings, output)


def _train(settings: TrainSettings, output: Path) -> None:
    seed_everything(settings.seed, verbose=False)
    given = settings.backbone
    check_backbone(settings, read_config(given.name, given.revision))
    groups = training_groups(settings.data)
    if settings.table_budgets:
        table_rows(settings.data)
    backbone = load_backbone(given.name, given.dtype, given.device, given.revision)
    if given.dtype is None and backbone.model.dtype == torch.float16:
        backbone.model.to(torch.bfloat16)  # gradients through the model would vanish below the least float16
    settings = replace(settings, precision=precision_of(settings, backbone))
    reducer = initial_reducer(settings, backbone)
    data = distill_data(settings, backbone, reducer, *groups)
    check_checkpoint(output / "last.ckpt", reducer, run_facts(settings, backbone.model, reducer, data))
    save(settings, output / "settings.yaml")
    if settings.lr_find:
        with quiet():
            data.prepare_data()
            found = sweep(settings, backbone.model, reducer, data)
        print(show(found, output / "lr_find.png"), end="")
        return
    start = time.monotonic()
    trainer, average = fit(settings, backbone.model, reducer, data, output)
    minutes = (time.monotonic() - start) / 60
    if not trainer.is_global_zero:
        return
    if average.average:
        reducer.load_state_dict(average.average)
    reducer = reducer.cpu().eval()
    size = sum(p.numel() for p in reducer.parameters())
    print(f"trained {settings.reducer.name}: {size:,} parameters, {settings.steps} steps, {minutes:.1f} minutes")
    config = export(settings, backbone, reducer, output / PLUGIN, len(groups[0]))
    print(f"plug-in: {output / PLUGIN}; settings: {output / 'settings.yaml'}")
    if settings.table_budgets:
        write_table(settings, backbone, reducer, config, output, output / PLUGIN, len(groups[0]))


def distill_data(
    settings: TrainSettings, backbone: Backbone, reducer: Reducer, groups: list[Group], val_groups: list[Group]
) -> DistillData:
    """The batches of a run, with a teacher that records what this reducer needs.

    Raises:
        UserError: A guide layer that the decoder does not have.
    """
    layers = guide_layers(settings, len(backbone.model.get_decoder().layers))
    signals = {PIXELS} if reducer.site == "encoder" else from_tower(reducer)  # inside the tower it gets its own
    cache = None if settings.data.cache is None else Path(settings.data.cache)
    teacher = Teacher(backbone, layers, settings.guide_rows, cache, signals)
    return DistillData(
        teacher, groups, val_groups, pictures=settings.pictures, turns=settings.turns, steps=settings.steps,
        seed=settings.seed,
    )  # fmt: skip
