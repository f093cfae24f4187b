"""``lit-reduce settings``: the reference of all settings, with defaults and limits."""

from collections.abc import Sequence
from pathlib import Path

from lit_reduce.errors import UserError
from lit_reduce.settings.reference import pages, write


def main(argv: Sequence[str]) -> None:
    """Run the command; ``--write`` writes the reference and the YAML files into a checkout, for its maintainers.

    Raises:
        UserError: There are other words.
    """
    if argv and list(argv) != ["--write"]:
        raise UserError(f"settings takes no settings, but got {argv[0]}")
    if not argv:
        print(pages()["docs/settings.md"], end="")
        return
    for path in write(Path.cwd()):
        print(path)
