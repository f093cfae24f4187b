"""Answer a question about a picture: ``python predict.py image=a.png prompt="..."``; ``--help`` shows the settings."""

import sys

from lit_reduce.cli import command
from lit_reduce.console import run

if __name__ == "__main__":
    sys.exit(run(command("predict")))
