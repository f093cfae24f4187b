"""Train a reducer: ``python train.py [key=value ...]``; ``--help`` shows the commented settings."""

import sys

from lit_reduce.cli import command
from lit_reduce.console import run

if __name__ == "__main__":
    sys.exit(run(command("train")))
