"""The settings of all commands and reducers as files: configs/*.yaml, configs/reducer/*.yaml and docs/settings.md."""

from pathlib import Path

from lit_reduce.errors import UserError
from lit_reduce.files import write_atomic
from lit_reduce.reducer import Reducer, available
from lit_reduce.settings.bench import BenchSettings
from lit_reduce.settings.compare import CompareSettings
from lit_reduce.settings.evaluate import EvaluateSettings
from lit_reduce.settings.predict import PredictSettings
from lit_reduce.settings.render import commented, commented_options, markdown, user_fields
from lit_reduce.settings.table import TableSettings
from lit_reduce.settings.train import TrainSettings

COMMANDS: dict[str, type] = {
    "predict": PredictSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "compare": CompareSettings,
    "table": TableSettings,
    "bench": BenchSettings,
}
MADE = "# Made by: lit-reduce settings --write. It shows the defaults; copy from it into a file for config=FILE.\n"
INTRO = """# Settings

Made by `lit-reduce settings --write`.

A setting is given as `key=value`. Its value comes from the defaults below, then the preset, then each `config=FILE`,
then the words of the command line; the later one wins. `--help` shows the defaults of a command, `--validate` what the
words resolve to. A preset holds values that suit one backbone: `preset=NAME` chooses a folder of `configs/preset/`,
`preset=none` none of them; without it a backbone takes the preset of its own name.
"""
OPTIONS = "## Options of reducers\n\nGiven as `reducer.options.KEY=VALUE`. A reducer that is not listed has none.\n"


def pages() -> dict[str, str]:
    """The files by their path below the root of a checkout."""
    found = {f"configs/{name}.yaml": MADE + commented(schema) for name, schema in COMMANDS.items()}
    parts = [INTRO, *(f"## {name}\n\n{markdown(schema)}" for name, schema in COMMANDS.items()), OPTIONS]
    for name, cls in available().items():
        if not _is_shipped(cls) or not user_fields(cls.config_class):
            continue
        first = (cls.__doc__ or "").partition("\n")[0]
        found[f"configs/reducer/{name}.yaml"] = MADE + commented_options(name, first, cls.config_class)
        parts.append(f"### {name}\n\n{first}\n\n{markdown(cls.config_class)}")
    return found | {"docs/settings.md": "\n".join(parts)}


def write(root: Path) -> list[Path]:
    """Writes all of them below the root of a checkout.

    Raises:
        UserError: It is none.
    """
    if not (root / "configs" / "preset").is_dir():
        raise UserError(f"{root} holds no configs/preset: run this at the root of a checkout")
    texts = pages()
    for name, text in texts.items():
        write_atomic(root / name, text)
    return [root / name for name in texts]


def _is_shipped(cls: type[Reducer]) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]
