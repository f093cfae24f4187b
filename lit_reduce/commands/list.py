"""``lit-reduce list``: the reducers, what they do and where they come from; then the plug-ins under checkpoints/."""

from collections.abc import Sequence
from pathlib import Path

from lit_reduce.console import columns
from lit_reduce.errors import UserError
from lit_reduce.plugin import CONFIG, read_config
from lit_reduce.reducer import available


def main(argv: Sequence[str]) -> None:
    """Run the command, which takes no settings.

    Raises:
        UserError: There are settings.
    """
    if argv:
        raise UserError(f"list takes no settings, but got {argv[0]}")
    reducers = [
        (name, cls.kind, cls.site, "trained" if cls.trained else "by name", ", ".join(sorted(cls.signals)) or "-",
         cls.paper)
        for name, cls in available().items()
    ]  # fmt: skip
    print(columns(("reducer", "kind", "site", "use", "signals", "paper"), reducers), end="")
    plugins = [_plugin(path.parent) for path in sorted(Path("checkpoints").rglob(CONFIG))]
    if plugins:
        print("\n" + columns(("plug-in", "reducer", "backbone", "budgets"), plugins), end="")


def _plugin(folder: Path) -> tuple[str, str, str, str]:
    """The line of a plug-in."""
    try:
        config = read_config(folder)
    except UserError:
        return str(folder), "damaged", "-", "-"
    budgets = f"{min(config.budgets)}-{max(config.budgets)}" if config.budgets else "-"
    return str(folder), config.reducer, config.backbone.id, budgets
