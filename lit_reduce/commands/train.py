"""``lit-reduce train``: train a reducer for a frozen backbone and export it as a plug-in."""

from collections.abc import Sequence

from lit_reduce import settings as files
from lit_reduce.commands.logs import quiet_transformers
from lit_reduce.distill.train import train
from lit_reduce.settings.train import TrainSettings


def main(argv: Sequence[str]) -> None:
    """Run the command on the words behind its name."""
    settings = files.resolve(TrainSettings, argv, files.configs_dir(), "train")
    quiet_transformers()
    train(settings)
