"""The reducer that training starts with: fresh, or with the weights of a plug-in; all weights trainable, or some."""

from lit_reduce.backbones import Backbone
from lit_reduce.backbones.towers import tower_of
from lit_reduce.errors import UserError
from lit_reduce.plugin import create_for, load_plugin
from lit_reduce.reducer import Reducer, find
from lit_reduce.settings.train import TrainSettings


def initial_reducer(settings: TrainSettings, backbone: Backbone) -> Reducer:
    """Makes the reducer, as wide as the backbone, with the weights to begin with when there are any.

    Raises:
        UserError: An unknown reducer or option, a plug-in that does not load or does not fit, unknown weights.
    """
    given = settings.reducer.options
    sizes = {name: size for name, size in sizes_of(backbone, settings.reducer.name).items() if not given.get(name)}
    reducer = create_for(backbone.identity, settings.reducer.name, {**given, **sizes})
    if settings.init_from is not None:
        load_weights(reducer, load_plugin(settings.init_from)[0], settings.init_from)
    if settings.trainable is not None:
        freeze_others(reducer, settings.trainable)
    return reducer


def sizes_of(backbone: Backbone, name: str) -> dict[str, int]:
    """Sizes of the backbone that a reducer has options for: of its heads (which may share keys) and of its tower."""
    attention = backbone.model.get_decoder().layers[0].self_attn
    parts = {"query_size": "q_proj", "key_size": "k_proj"}
    options = find(name).config_class.__dataclass_fields__
    sizes = {
        option: int(getattr(attention, part).out_features)
        for option, part in parts.items()
        if option in options and hasattr(attention, part)
    }
    return sizes | ({"blocks": tower_of(backbone.model).depth} if "blocks" in options else {})


def load_weights(reducer: Reducer, other: Reducer, path: str) -> None:
    """Copies weights from another reducer of the kind; what that lacks stays fresh.

    It may have been trained on another backbone, as long as widths are the same.

    Raises:
        UserError: Another method, other shapes, or weights for which there is no place.
    """
    own, given = reducer.state_dict(), other.state_dict()
    if other.name != reducer.name:
        raise UserError(f"init_from={path} is of {other.name}, but {reducer.name} is to be trained")
    for name, x in given.items():
        if name not in own or own[name].shape != x.shape:
            here = "nothing" if name not in own else str(list(own[name].shape))
            raise UserError(f"init_from={path} has {name} {list(x.shape)} where there is {here} here; give its options")
    reducer.load_state_dict(given, strict=False)


def freeze_others(reducer: Reducer, trainable: list[str]) -> None:
    """Freezes every weight but those that are named, by their own names or those of their modules.

    Raises:
        UserError: A name that means no weight.
    """
    weights = dict(reducer.named_parameters())
    found = {part: {name for name in weights if f"{name}.".startswith(f"{part}.")} for part in trainable or [""]}
    for part, names in found.items():
        if not names:
            known = ", ".join(dict.fromkeys(name.partition(".")[0] for name in weights))
            raise UserError(
                f"trainable={trainable}: {reducer.name} has no weights '{part}' with these options; it has {known}"
            )
    free = set[str]().union(*found.values())
    for name, weight in weights.items():
        weight.requires_grad_(name in free)
