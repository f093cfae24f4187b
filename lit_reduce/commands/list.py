"""``lit-reduce list``: the reducers, what they do and where they come from; then the plug-ins."""

from collections.abc import Sequence
from pathlib import Path

from lit_reduce.console import columns
from lit_reduce.errors import UserError
from lit_reduce.plugin import CONFIG, read_config
from lit_reduce.reducer import available
from lit_reduce.registry import plugin_folders


def main(argv: Sequence[str]) -> None:
    """Run the command, which takes no settings; plug-ins are those under checkpoints/ and of installed references.

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
    folders = {str(path.parent): path.parent for path in sorted(Path("checkpoints").rglob(CONFIG))}
    here = {folder.resolve() for folder in folders.values()}
    folders |= {name: folder for name, folder in plugin_folders().items() if folder.resolve() not in here}
    plugins = [_plugin(name, folder) for name, folder in folders.items()]
    if plugins:
        print("\n" + columns(("plug-in", "reducer", "backbone", "budgets"), plugins), end="")


def _plugin(name: str, folder: Path) -> tuple[str, str, str, str]:
    """The line of a plug-in."""
    try:
        config = read_config(folder)
    except UserError:
        return name, "damaged", "-", "-"
    budgets = f"{min(config.budgets)}-{max(config.budgets)}" if config.budgets else "-"
    return name, config.reducer, config.backbone.id, budgets
