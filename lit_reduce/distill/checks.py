"""Checks of training settings that run before anything heavy starts."""

from typing import Any

from lit_reduce import options
from lit_reduce.backbones import Backbone, family_of
from lit_reduce.backbones.families import Family
from lit_reduce.backbones.layouts import AnyRes, Plain
from lit_reduce.backbones.shapes import PREFIX
from lit_reduce.errors import UserError
from lit_reduce.precision import fast_in_bfloat16
from lit_reduce.reducer import Reducer, find
from lit_reduce.settings.train import TrainSettings


def check(settings: TrainSettings) -> None:
    """Refuses settings that cannot work, before anything is loaded.

    Raises:
        UserError: One of them cannot.
    """
    options.check(settings)
    weights = settings.budget_weights
    if weights is not None and (len(weights) != len(settings.budgets) or sum(weights) <= 0):
        raise UserError(f"budget_weights={weights}: give one weight, 0 or more, for each of budgets={settings.budgets}")
    for name in ("budgets", "val_budgets", "table_budgets"):
        for budget in getattr(settings, name):
            if isinstance(budget, float) and budget > 1:
                raise UserError(f"{name}={budget}: give a count (whole number, 64) or a ratio in (0, 1] (0.25)")
    if len({type(budget) for budget in settings.budgets}) > 1:
        raise UserError(f"budgets={settings.budgets}: give counts alone, or ratios alone")
    _check_reducers(settings)


def check_backbone(settings: TrainSettings, config: Any) -> None:
    """Refuses a backbone on which this reducer cannot be trained, by its config, before its weights are loaded.

    Raises:
        UserError: It cannot, or validation budgets exceed the count of its visual tokens, where that is known.
    """
    if settings.backbone.name.startswith(PREFIX):
        raise UserError(f"{settings.backbone.name} has random weights and no processor; train on a real backbone")
    family, cls = family_of(config), find(settings.reducer.name)
    if (reason := _unfit(cls, family, config)) is not None:
        raise UserError(f"reducer {cls.name} cannot be trained on the family '{family.name}': {reason}")
    check_budgets(settings, family.tokens(config))
    guide_layers(settings, config.get_text_config().num_hidden_layers)


def _unfit(cls: type[Reducer], family: Family, config: Any) -> str | None:
    """Why a reducer cannot act on a family."""
    instead = "use one at the projector, as covipal or packer"
    turned = "image_grid_thw" in {getattr(layout, "sizes", None) for layout in family.layouts.values()}
    if cls.warmup_target == "keys" and (turned or family.looks_ahead):
        return f"its maps are fitted to keys that turn by counted positions and see only what stands before; {instead}"
    if cls.site == "decoder" and cls.kind == "register" and family.looks_ahead:
        return f"pictures or words see what comes behind them, and so would see its learned tokens; {instead}"
    rows = getattr(config.vision_config, "model_type", "") == "pixtral"
    if cls.site == "encoder" and cls.kind == "register":
        if rows or not isinstance(family.layouts["image"], Plain | AnyRes):
            return f"the tower packs its images into one row, or patches are mixed before the projector; {instead}"
        if family.name == "llava" and getattr(config, "vision_feature_select_strategy", "default") == "full":
            return f"this model reads CLS as a patch; {instead}"
    return None


def _check_reducers(settings: TrainSettings) -> None:
    name = settings.reducer.name
    cls = find(name)
    if settings.checkpointing and (cls.site in ("decoder", "cache") or cls.kind == "recall"):
        raise UserError(
            f"checkpointing=true: {name} acts inside the language model, whose layers cannot be run twice then; "
            "leave it false"
        )
    if not cls.trained:
        raise UserError(f"reducer {name} has nothing to train; use it by name in predict and evaluate")
    for baseline in settings.baselines:
        if find(baseline).trained:
            raise UserError(f"baseline {baseline} needs training; name training-free reducers")


def check_budgets(settings: TrainSettings, total: int) -> None:
    """Refuses validation budgets above the backbone's count of visual tokens; 0: it depends on the picture.

    Raises:
        UserError: One is.
    """
    if total and max((budget for budget in settings.val_budgets if isinstance(budget, int)), default=0) > total:
        raise UserError(
            f"val_budgets={settings.val_budgets}: a picture has {total} visual tokens here; give at most {total}"
        )


def precision_of(settings: TrainSettings, backbone: Backbone) -> str:
    """Lightning's name of the precision; ``auto`` is bf16-mixed on a CPU that is faster in bfloat16, else 32-true."""
    if settings.precision != "auto":
        return settings.precision
    device = backbone.model.device
    return "bf16-mixed" if device.type == "cpu" and fast_in_bfloat16(device) else "32-true"


def guide_layers(settings: TrainSettings, count: int) -> list[int]:
    """Which of ``count`` decoder layers guide stage 1 by their attention; by default the upper half without the last.

    Raises:
        UserError: A layer that the decoder does not have.
    """
    layers = settings.guide_layers
    layers = list(range(count // 2, max(count - 1, 1))) if layers is None else layers
    if not layers or not all(0 <= i < count for i in layers):
        raise UserError(f"guide_layers={layers}: the decoder has layers 0 to {count - 1}")
    return layers
