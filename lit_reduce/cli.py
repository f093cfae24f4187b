"""The command line: a verb, settings as ``key=value``, one clear line when something is wrong."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lit_reduce.console import Command, columns, run
from lit_reduce.errors import UserError
from lit_reduce.registry import plugin_folders, question_sets

USAGE = """usage: lit-reduce VERB [key=value ...] [--help] [--validate]

  predict   answer a question about a picture, or a JSON-lines file of them
  train     train a reducer for a frozen backbone and export it as a plug-in
  evaluate  score a plug-in or a reducer by name on a JSON-lines file
  compare   score many side by side, with pictures of what each kept
  table     the plug-ins of a backbone and the yardsticks in one table: accuracy, FLOPs, time
  bench     count and time what a reducer saves and costs
  list      show the reducers that can be used by name
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``lit-reduce``; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    return run(_command(words[0]), words[1:])


def predict(argv: Sequence[str]) -> None:
    """``predict``: see :mod:`lit_reduce.inference.predict`."""
    from lit_reduce.inference.predict import PredictSettings
    from lit_reduce.inference.predict import predict as answer
    from lit_reduce.settings import configs_dir, resolve

    chosen = resolve(PredictSettings, argv, configs_dir(), "predict")
    _quiet()
    answer(chosen)


def train(argv: Sequence[str]) -> None:
    """``train``: see :mod:`lit_reduce.distill.train`."""
    from lit_reduce.distill.settings import TrainSettings
    from lit_reduce.distill.train import train as distill
    from lit_reduce.settings import configs_dir, resolve

    chosen = resolve(TrainSettings, argv, configs_dir(), "train")
    _quiet()
    distill(chosen)


def evaluate(argv: Sequence[str]) -> None:
    """``evaluate``: see :mod:`lit_reduce.evaluate.run`."""
    from lit_reduce.evaluate.run import EvaluateSettings
    from lit_reduce.evaluate.run import run as score
    from lit_reduce.settings import configs_dir, resolve

    chosen = resolve(EvaluateSettings, argv, configs_dir(), "evaluate")
    _quiet()
    score(chosen, question_sets())


def compare(argv: Sequence[str]) -> None:
    """``compare``: see :mod:`lit_reduce.evaluate.compare`."""
    from lit_reduce.evaluate.compare import CompareSettings
    from lit_reduce.evaluate.compare import compare as side_by_side
    from lit_reduce.settings import configs_dir, resolve

    chosen = resolve(CompareSettings, argv, configs_dir(), "compare")
    _quiet()
    side_by_side(chosen, question_sets())


def table(argv: Sequence[str]) -> None:
    """``table``: see :mod:`lit_reduce.evaluate.table`."""
    from lit_reduce.evaluate.table import TableSettings
    from lit_reduce.evaluate.table import table as make
    from lit_reduce.settings import configs_dir, resolve

    chosen = resolve(TableSettings, argv, configs_dir(), "table")
    _quiet()
    make(chosen, question_sets())


def bench(argv: Sequence[str]) -> None:
    """``bench``: see :mod:`lit_reduce.benchmark.bench`."""
    from lit_reduce.benchmark.bench import BenchSettings
    from lit_reduce.benchmark.bench import run as measure
    from lit_reduce.settings import configs_dir, resolve

    chosen = resolve(BenchSettings, argv, configs_dir(), "bench")
    _quiet()
    measure(chosen)


def list_reducers(argv: Sequence[str]) -> None:
    """``list``: the reducers, what they do and where they come from; then the plug-ins.

    Plug-ins are those under checkpoints/ and those of the installed references.
    """
    from lit_reduce.plugin import CONFIG, read_config
    from lit_reduce.reducer import available

    if argv:
        raise UserError(f"list takes no settings, but got {argv[0]}")
    lines = []
    for name, cls in available().items():
        weights = "trained" if cls.trained else "by name"
        lines.append((name, cls.kind, cls.site, weights, ", ".join(sorted(cls.signals)) or "-", cls.paper))
    print(columns(("reducer", "kind", "site", "use", "signals", "paper"), lines), end="")
    folders = {str(path.parent): path.parent for path in sorted(Path("checkpoints").rglob(CONFIG))}
    seen = {folder.resolve() for folder in folders.values()}
    folders |= {name: folder for name, folder in plugin_folders().items() if folder.resolve() not in seen}
    plugins = []
    for name, folder in folders.items():
        try:
            config = read_config(folder)
        except UserError:
            plugins.append((name, "damaged", "-", "-"))
            continue
        budget = f"{min(config.budgets)}-{max(config.budgets)}" if config.budgets else "-"
        plugins.append((name, config.reducer, config.backbone.id, budget))
    if plugins:
        print("\n" + columns(("plug-in", "reducer", "backbone", "budgets"), plugins), end="")


def _command(verb: str) -> Command:
    verbs: dict[str, Command] = {
        "predict": predict,
        "train": train,
        "evaluate": evaluate,
        "compare": compare,
        "table": table,
        "bench": bench,
        "list": list_reducers,
    }
    if verb in verbs:
        return verbs[verb]

    def unknown(_: Sequence[str]) -> None:
        raise UserError(f"unknown verb {verb}: use {', '.join(verbs)}")

    return unknown


def _quiet() -> None:
    """Keep stderr for our own words: no notices and loading bars of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
