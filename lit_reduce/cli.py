"""The command line: a verb, settings as ``key=value``, one clear line when something is wrong."""

import sys
from collections.abc import Sequence
from importlib import import_module

from lit_reduce.console import Command, run
from lit_reduce.errors import UserError

VERBS = {
    "predict": "answer a question about a picture, or a JSON-lines file of them",
    "train": "train a reducer for a frozen backbone and export it as a plug-in",
    "evaluate": "score a plug-in or a reducer by name on a JSON-lines file",
    "compare": "score many side by side, with pictures of what each kept",
    "table": "the plug-ins of a backbone and baselines in one table: accuracy, FLOPs, time",
    "bench": "count and time what a reducer saves and costs",
    "list": "show the reducers that can be used by name",
    "settings": "show all settings with their defaults and limits",
}
"""What each verb does; the module of that name in :mod:`lit_reduce.commands` does it."""

USAGE = "usage: lit-reduce VERB [key=value ...] [--help] [--validate]\n\n" + "".join(
    f"  {verb:<9} {text}\n" for verb, text in VERBS.items()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``lit-reduce``; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    return run(command(words[0]), words[1:])


def command(verb: str) -> Command:
    """The command of a verb; its module is imported when it runs."""

    def call(argv: Sequence[str]) -> None:
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb}: use {', '.join(VERBS)}")
        import_module(f"lit_reduce.commands.{verb}").main(argv)

    return call


if __name__ == "__main__":
    sys.exit(main())
