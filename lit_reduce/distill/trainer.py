"""The Lightning Trainer of a run: callbacks, the checkpoint to resume from, and settings that it refuses."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tqdm import tqdm

from lit_reduce.distill.callbacks import MovingAverage, StepBar
from lit_reduce.distill.data import DistillData
from lit_reduce.distill.kv_regression import PICTURES, teach_keys
from lit_reduce.distill.logs import LOGGERS, quiet
from lit_reduce.distill.module import Distiller
from lit_reduce.errors import UserError
from lit_reduce.reducer import Reducer
from lit_reduce.settings.train import TrainSettings


def fit(
    settings: TrainSettings, model: Any, reducer: Reducer, data: DistillData, output: Path
) -> tuple[Trainer, MovingAverage]:
    """Trains the reducer, from the last checkpoint in ``output`` on when there is one.

    Raises:
        UserError: A checkpoint that cannot be resumed from, or a precision that the machine does not have.
    """
    module, average = Distiller(model, reducer, settings), MovingAverage(settings.ema)
    checkpoint = output / "last.ckpt"
    step = check_checkpoint(checkpoint, module)
    if reducer.warmup_target == "keys" and settings.init_from is None and not checkpoint.is_file():
        read = tqdm(data.groups[:PICTURES], desc="keys", unit="picture")
        teach_keys(model, reducer, (data.held[0].outputs(group) for group in read))
    last = ModelCheckpoint(
        output, filename="last", every_n_train_steps=settings.save_every, save_top_k=1, enable_version_counter=False
    )
    patience = settings.patience
    early = [] if patience is None else [EarlyStopping("val/accuracy", mode="max", patience=patience)]
    with quiet():
        trainer = _trainer(settings, model, output, step, [average, last, StepBar(), *early])
        trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint.is_file() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return trainer, average


def check_checkpoint(path: Path, module: Distiller) -> int:
    """The step of a checkpoint, 0 where there is none.

    Raises:
        UserError: It is damaged, of another reducer, or of a run that trained other weights.
    """
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
    groups = [group for state in checkpoint.get("optimizer_states", ()) for group in state["param_groups"]]
    if any(len(group["params"]) != trained for group in groups):
        raise UserError(f"{path} is of a run with another setting of trainable: give another output, or remove it")
    return int(checkpoint.get("global_step", 0))


def _trainer(settings: TrainSettings, model: Any, output: Path, step: int, callbacks: list[Any]) -> Trainer:
    try:
        return Trainer(
            max_steps=settings.steps, val_check_interval=settings.val_every, check_val_every_n_epoch=None,
            accelerator="cpu" if model.device.type == "cpu" else settings.accelerator, devices=settings.devices,
            strategy="ddp" if settings.devices > 1 else "auto", precision=settings.precision,  # type: ignore[arg-type]
            gradient_clip_val=settings.clip or None, logger=LOGGERS[settings.logger](output, step),
            callbacks=callbacks, num_sanity_val_steps=0, log_every_n_steps=5, enable_model_summary=False,
            use_distributed_sampler=False, default_root_dir=output,
        )  # fmt: skip
    except (ValueError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"precision={settings.precision} accelerator={settings.accelerator} cannot be used: {reason}"
        ) from error
