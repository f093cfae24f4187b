"""Checks of training settings that run before anything heavy starts."""

from lit_reduce import options
from lit_reduce.backbones import Backbone
from lit_reduce.errors import UserError
from lit_reduce.precision import fast_in_bfloat16
from lit_reduce.reducer import find
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
    _check_reducers(settings)


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


def check_budgets(settings: TrainSettings, backbone: Backbone) -> None:
    """Refuses validation budgets above the backbone's count of visual tokens, where that is known.

    Raises:
        UserError: One is.
    """
    total = backbone.identity.tokens
    if total and max(settings.val_budgets) > total:
        raise UserError(
            f"val_budgets={settings.val_budgets}: a picture has {total} visual tokens here; give at most {total}"
        )


def precision_of(settings: TrainSettings, backbone: Backbone) -> str:
    """Lightning's name of the precision; ``auto`` is bf16-mixed on a CPU that is faster in bfloat16, else 32-true."""
    if settings.precision != "auto":
        return settings.precision
    device = backbone.model.device
    return "bf16-mixed" if device.type == "cpu" and fast_in_bfloat16(device) else "32-true"


def guide_layers(settings: TrainSettings, backbone: Backbone) -> list[int]:
    """The decoder layers whose attention guides stage 1; by default the upper half without the last.

    Raises:
        UserError: A layer that the decoder does not have.
    """
    count = len(backbone.model.get_decoder().layers)
    layers = settings.guide_layers
    layers = list(range(count // 2, max(count - 1, 1))) if layers is None else layers
    if not layers or not all(0 <= i < count for i in layers):
        raise UserError(f"guide_layers={layers}: the decoder has layers 0 to {count - 1}")
    return layers
