"""``train``: from settings to an exported plug-in and a table that compares it with the yardsticks."""

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tqdm import tqdm

from lit_reduce import settings as files
from lit_reduce.backbones import Backbone, load_backbone
from lit_reduce.data.groups import Group, group_rows
from lit_reduce.data.jsonl import Row, read_rows
from lit_reduce.distill.callbacks import MovingAverage, StepBar
from lit_reduce.distill.data import DistillData
from lit_reduce.distill.kv_regression import PICTURES, teach_keys
from lit_reduce.distill.logs import LOGGERS, quiet
from lit_reduce.distill.lr_finder import show, sweep
from lit_reduce.distill.module import Distiller
from lit_reduce.distill.relaxation import GATES
from lit_reduce.distill.settings import TrainSettings
from lit_reduce.distill.teacher import PIXELS, Teacher
from lit_reduce.errors import UserError
from lit_reduce.evaluate.evaluator import evaluate
from lit_reduce.evaluate.results import ALL_TOKENS, Results
from lit_reduce.files import check_writable
from lit_reduce.inference.spec import ReducerSpec
from lit_reduce.plugin import FORMAT_VERSION, PluginConfig, create_for, load_plugin, save_plugin
from lit_reduce.precision import fast_in_bfloat16
from lit_reduce.reducer import Reducer, create, find
from lit_reduce.report.markdown import markdown
from lit_reduce.report.summary import Line, facts, summary
from lit_reduce.report.write import write_report
from lit_reduce.runtime.decoder.attention_rows import from_tower
from lit_reduce.version import __version__

PLUGIN = "plugin"
WORLDS = ("pocket", "pocket-hd")


def train(chosen: TrainSettings) -> None:
    """Distil a reducer, export it to ``output/plugin``, compare it with the yardsticks and print the table.

    A run that was killed goes on from ``output/last.ckpt`` when it is started again.

    Raises:
        UserError: A setting, the data or the backbone is not usable.
    """
    check(chosen)
    output = Path(chosen.output)
    check_writable(output / "table.json")
    seed_everything(chosen.seed, verbose=False)
    backbone = load_backbone(
        chosen.backbone.name, chosen.backbone.dtype, chosen.backbone.device, chosen.backbone.revision
    )
    chosen = replace(chosen, precision=precision_of(chosen, backbone))
    total = backbone.identity.tokens
    if total and max(chosen.val_budgets) > total:
        raise UserError(
            f"val_budgets={chosen.val_budgets}: a picture has {total} visual tokens here; give at most {total}"
        )
    reducer = fresh_reducer(chosen, backbone)
    groups, val_groups = training_groups(chosen)
    files.save(chosen, output / "settings.yaml")
    layers = guide_layers(chosen, backbone)
    signals = from_tower(reducer) if reducer.site != "encoder" else {PIXELS}  # those it gets inside the tower
    teacher = Teacher(backbone, layers, chosen.guide_rows, _cache(chosen), signals)
    data = DistillData(
        teacher, groups, val_groups, pictures=chosen.pictures, turns=chosen.turns, steps=chosen.steps, seed=chosen.seed
    )
    if chosen.lr_find:
        with quiet():
            data.prepare_data()
            found = sweep(chosen, backbone.model, reducer, data)
        print(show(found, output / "lr_find.png"), end="")
        return
    start = time.monotonic()
    trainer, average = fit(chosen, backbone.model, reducer, data, output)
    minutes = (time.monotonic() - start) / 60
    if not trainer.is_global_zero:
        return
    if average.average:
        reducer.load_state_dict(average.average)
    reducer = reducer.cpu().eval()
    size = sum(p.numel() for p in reducer.parameters())
    print(f"trained {chosen.reducer.name}: {size:,} parameters, {chosen.steps} steps, {minutes:.1f} minutes")
    config = plugin_config(chosen, backbone, reducer)
    config.metrics = {"trained_on": machine(backbone.model.device)}
    save_plugin(output / PLUGIN, reducer, config, {"notes": notes(chosen)})  # safe already while the table is made
    print(f"plug-in: {output / PLUGIN}; settings: {output / 'settings.yaml'}")
    if chosen.table_budgets:
        write_table(chosen, backbone, reducer, config, output, output / PLUGIN)


def write_table(
    chosen: TrainSettings, backbone: Backbone, reducer: Reducer, config: PluginConfig, output: Path, plugin: Path
) -> None:
    """Compares a plug-in with the yardsticks: the table goes to ``output``, its figures to the card in ``plugin``."""
    results, lines = compare(chosen, backbone, reducer)
    report = summary(results, lines)
    write_report(report, output / "table.json")
    own = {name: value for name, value in config.metrics.items() if not isinstance(value, dict)}
    config.metrics = {**card_metrics(chosen.reducer.name, report), **own}
    save_plugin(plugin, reducer, config, {"notes": notes(chosen, results, backbone.model.device)})
    print(markdown(report), end="")
    print(f"table: {output / 'table'}.json, .md, .png")


def machine(device: torch.device) -> str:
    """What computes, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"


def check(chosen: TrainSettings) -> None:
    """Refuses settings that cannot work, before anything is loaded."""
    for name in ("steps", "pictures", "turns", "save_every", "val_every", "devices", "table_batch"):
        if getattr(chosen, name) < 1:
            raise UserError(f"{name}={getattr(chosen, name)}: give 1 or more")
    if not chosen.budgets or min(chosen.budgets) < 1:
        raise UserError(f"budgets={chosen.budgets}: give the smallest and the largest count of tokens to train for")
    if not chosen.val_budgets or min(chosen.val_budgets) < 1:
        raise UserError(f"val_budgets={chosen.val_budgets}: give one count of tokens or more, each at least 1")
    if chosen.table_budgets and min(chosen.table_budgets) < 1:
        raise UserError(f"table_budgets={chosen.table_budgets}: give counts of at least 1")
    if chosen.tau <= 0 or chosen.candidates < 1:
        raise UserError(f"tau={chosen.tau}, candidates={chosen.candidates}: tau must be above 0, candidates at least 1")
    weights = chosen.budget_weights
    if weights is not None and (len(weights) != len(chosen.budgets) or min(weights) < 0 or sum(weights) <= 0):
        raise UserError(f"budget_weights={weights}: give one weight, 0 or more, for each of budgets={chosen.budgets}")
    if not 0 <= chosen.curriculum <= 1:
        raise UserError(f"curriculum={chosen.curriculum}: give a share of the steps, from 0 to 1")
    if chosen.gate not in GATES:
        raise UserError(f"gate={chosen.gate}: use {', '.join(GATES)}")
    if not chosen.relax or min(chosen.relax) <= 0:
        raise UserError(f"relax={chosen.relax}: give the first and the last softness, above 0")
    if chosen.guide_rows not in ("text", "answer"):
        raise UserError(f"guide_rows={chosen.guide_rows}: use text or answer")
    if chosen.positions not in ("keep", "renumber"):
        raise UserError(f"positions={chosen.positions}: use keep or renumber")
    if chosen.logger not in LOGGERS:
        raise UserError(f"logger={chosen.logger}: use {', '.join(LOGGERS)}")
    cls = find(chosen.reducer.name)
    if chosen.checkpointing and (cls.site in ("decoder", "cache") or cls.kind == "recall"):
        raise UserError(
            f"checkpointing=true: {chosen.reducer.name} acts inside the language model, whose layers cannot be run "
            "twice then; leave it false"
        )
    if not cls.trained:
        raise UserError(f"reducer {chosen.reducer.name} has nothing to train; use it by name in predict and evaluate")
    for name in chosen.yardsticks:
        if find(name).trained:
            raise UserError(f"yardstick {name} needs training; name training-free reducers")


def precision_of(chosen: TrainSettings, backbone: Backbone) -> str:
    """Lightning's name of the precision; ``auto`` is bf16-mixed on a CPU that is faster in bfloat16, else 32-true."""
    if chosen.precision != "auto":
        return chosen.precision
    device = backbone.model.device
    return "bf16-mixed" if device.type == "cpu" and fast_in_bfloat16(device) else "32-true"


def fresh_reducer(chosen: TrainSettings, backbone: Backbone) -> Reducer:
    """Makes the reducer, as wide as the backbone, with the weights to begin with when there are any."""
    reducer = create_for(backbone.identity, chosen.reducer.name, chosen.reducer.options)
    if chosen.start is not None:
        load_weights(reducer, load_plugin(chosen.start)[0], chosen.start)
    if chosen.only is not None:
        freeze_but(reducer, chosen.only)
    return reducer


def freeze_but(reducer: Reducer, only: list[str]) -> None:
    """Lets some weights train alone.

    Raises:
        UserError: A name that means no weight.
    """
    weights = dict(reducer.named_parameters())
    found = {part: {name for name in weights if f"{name}.".startswith(f"{part}.")} for part in only or [""]}
    for part, names in found.items():
        if not names:
            known = ", ".join(dict.fromkeys(name.partition(".")[0] for name in weights))
            raise UserError(f"only={only}: {reducer.name} has no weights '{part}' with these options; it has {known}")
    free = set[str]().union(*found.values())
    for name, weight in weights.items():
        weight.requires_grad_(name in free)


def load_weights(reducer: Reducer, other: Reducer, path: str) -> None:
    """Copies weights from another reducer of the kind; what that lacks stays fresh.

    It may have been trained on another backbone, as long as widths are the same.

    Raises:
        UserError: Another method, other shapes, or weights for which there is no place.
    """
    own, given = reducer.state_dict(), other.state_dict()
    if other.name != reducer.name:
        raise UserError(f"start={path} is of {other.name}, but {reducer.name} is to be trained")
    for name, x in given.items():
        if name not in own or own[name].shape != x.shape:
            here = "nothing" if name not in own else str(list(own[name].shape))
            raise UserError(f"start={path} has {name} {list(x.shape)} where there is {here} here; give its options")
    reducer.load_state_dict(given, strict=False)


def training_groups(chosen: TrainSettings) -> tuple[list[Group], list[Group]]:
    """Training and validation pictures with their questions."""
    data = chosen.data
    if data.name in WORLDS:
        from lit_reduce_pocket.data import scene_groups
        from lit_reduce_pocket.hd import hd_groups

        make = scene_groups if data.name == "pocket" else hd_groups
        return make("train", data.images, data.turns), make("val", data.val_images, data.turns)
    groups = group_rows(read_rows(data.name))
    if data.val is not None:
        return groups, group_rows(read_rows(data.val))
    held = max(1, len(groups) // 20)
    if len(groups) < 2:
        raise UserError(f"data {data.name}: one picture cannot both train and validate; give more, or data.val=FILE")
    return groups[:-held], groups[-held:]


def guide_layers(chosen: TrainSettings, backbone: Backbone) -> list[int]:
    """The decoder layers whose attention guides stage 1; by default the upper half without the last."""
    count = len(backbone.model.get_decoder().layers)
    layers = chosen.guide_layers if chosen.guide_layers is not None else list(range(count // 2, max(count - 1, 1)))
    if not layers or not all(0 <= i < count for i in layers):
        raise UserError(f"guide_layers={layers}: the decoder has layers 0 to {count - 1}")
    return layers


def fit(
    chosen: TrainSettings, model: Any, reducer: Reducer, data: DistillData, output: Path
) -> tuple[Trainer, MovingAverage]:
    """Runs the Trainer, from the last checkpoint of ``output`` when there is one."""
    module, average = Distiller(model, reducer, chosen), MovingAverage(chosen.ema)
    checkpoint = output / "last.ckpt"
    step = check_checkpoint(checkpoint, module)
    if reducer.warmup_target == "keys" and chosen.start is None and not checkpoint.is_file():
        read = tqdm(data.groups[:PICTURES], desc="keys", unit="picture")
        teach_keys(model, reducer, (data.held[0].outputs(group) for group in read))
    last = ModelCheckpoint(
        output, filename="last", every_n_train_steps=chosen.save_every, save_top_k=1, enable_version_counter=False
    )
    patience = chosen.patience
    early = [] if patience is None else [EarlyStopping("val/accuracy", mode="max", patience=patience)]
    with quiet():
        trainer = _trainer(chosen, model, output, step, [average, last, StepBar(), *early])
        trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint.is_file() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return trainer, average


def _trainer(chosen: TrainSettings, model: Any, output: Path, step: int, callbacks: list[Any]) -> Trainer:
    try:
        return Trainer(
            max_steps=chosen.steps, val_check_interval=chosen.val_every, check_val_every_n_epoch=None,
            accelerator="cpu" if model.device.type == "cpu" else chosen.accelerator, devices=chosen.devices,
            strategy="ddp" if chosen.devices > 1 else "auto", precision=chosen.precision,  # type: ignore[arg-type]
            gradient_clip_val=chosen.clip or None, logger=LOGGERS[chosen.logger](output, step), callbacks=callbacks,
            num_sanity_val_steps=0, log_every_n_steps=5, enable_model_summary=False, use_distributed_sampler=False,
            default_root_dir=output,
        )  # fmt: skip
    except (ValueError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"precision={chosen.precision} accelerator={chosen.accelerator} cannot be used: {reason}"
        ) from error


def check_checkpoint(path: Path, module: Distiller) -> int:
    """Refuses a checkpoint that cannot be resumed from, before anything is done with it; returns its step, or 0."""
    if not path.is_file():
        return 0
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint["state_dict"]
    except (RuntimeError, EOFError, KeyError, UnpicklingError) as error:
        raise UserError(f"{path} is damaged and cannot be resumed from: remove it, or give another output") from error
    own = module.state_dict()
    if {name: x.shape for name, x in saved.items()} != {name: x.shape for name, x in own.items()}:
        raise UserError(f"{path} is of another reducer: give another output, or remove it")
    trained = sum(weight.requires_grad for weight in module.reducer.parameters())
    if any(
        len(group["params"]) != trained for x in checkpoint.get("optimizer_states", ()) for group in x["param_groups"]
    ):
        raise UserError(f"{path} is of a run with another setting of only: give another output, or remove it")
    return int(checkpoint.get("global_step", 0))


def compare(chosen: TrainSettings, backbone: Backbone, reducer: Reducer) -> tuple[Results, dict[str, Line]]:
    """Scores the reducer and the baselines on the test rows at every budget of the table; returns the lines as well."""
    rows, total = test_rows(chosen)
    specs = {chosen.reducer.name: ReducerSpec(reducer, positions=chosen.positions)}
    specs |= {name: ReducerSpec(create(name)) for name in chosen.yardsticks}
    most = backbone.identity.tokens or max(chosen.table_budgets)  # 0 where the count depends on the picture
    keeps = [k for k in chosen.table_budgets if k <= most]
    lines = {name: Line([name], facts=facts(spec)) for name, spec in specs.items()}
    with tqdm(total=total, desc="table", unit="row") as bar:
        results = evaluate(backbone, specs, keeps, rows, chosen.table_batch, bar.update, timing_runs=chosen.runs)
    return results, lines


def test_rows(chosen: TrainSettings) -> tuple[Iterable[Row], int]:
    """The questions of the table: the world's test split, or the user's file."""
    data = chosen.data
    if data.name in WORLDS and data.test is None:
        from lit_reduce_pocket.sets import SETS

        return SETS[data.name](data.test_rows), data.test_rows
    source = data.test or data.val
    if source is None:
        raise UserError("no questions to score on: give data.test=FILE.jsonl with image, prompt and answer")
    rows = read_rows(source, need_answers=True)[: data.test_rows]
    return rows, len(rows)


def plugin_config(chosen: TrainSettings, backbone: Backbone, reducer: Reducer) -> PluginConfig:
    """What the plug-in says about itself."""
    return PluginConfig(
        format_version=FORMAT_VERSION, reducer=reducer.name, options=dict(vars(reducer.config)),
        backbone=backbone.identity, budgets=sorted(chosen.budgets), positions=chosen.positions,
        library_version=__version__,
    )  # fmt: skip


def card_metrics(name: str, report: dict[str, Any]) -> dict[str, Any]:
    """Accuracy with its interval and time to first token by budget, for the model card."""
    entries = [e for e in report["scores"] if e["reducer"] in (name, ALL_TOKENS)]
    by_budget = {"all" if e["keep"] is None else str(e["keep"]): e for e in entries}
    metrics: dict[str, Any] = {"accuracy": {k: [e["accuracy"], e["low"], e["high"]] for k, e in by_budget.items()}}
    for phase in ("first_token_ms", "reducer_ms"):
        timed = {k: e[phase]["median"] for k, e in by_budget.items() if phase in e}
        metrics |= {phase: timed} if timed else {}
    return metrics


def notes(chosen: TrainSettings, results: Results | None = None, device: torch.device | None = None) -> str:
    """The card's account of how the plug-in and its numbers came about."""
    made = (
        f"Trained on `{chosen.data.name}` ({chosen.data.images} pictures, {chosen.steps} steps of "
        f"{chosen.pictures * chosen.turns} questions, seed {chosen.seed})"
        f"{'' if chosen.start is None else ', from the weights of `' + chosen.start + '` on'}."
    )
    if results is None or device is None:
        return made
    made += f" Scored on {results.rows} test questions."
    if not chosen.runs:
        return made
    return f"{made} Times: {machine(device)}, one question, median of {chosen.runs} alternating runs."


def _cache(chosen: TrainSettings) -> Path | None:
    return None if chosen.data.cache is None else Path(chosen.data.cache)
