"""Writing a report: JSON, Markdown and a plot under one name."""

import json
from pathlib import Path
from typing import Any

from lit_reduce.files import atomic_path, write_atomic
from lit_reduce.report.markdown import markdown
from lit_reduce.report.plots import plot


def write_report(report: dict[str, Any], path: str | Path) -> list[Path]:
    """Write a summary to ``path`` (JSON) and, beside it, to the same name with ``.md`` and ``.png``.

    Returns:
        The three files.

    Raises:
        UserError: The folder cannot be written.
    """
    path = Path(path)
    text, picture = path.with_suffix(".md"), path.with_suffix(".png")
    write_atomic(path, json.dumps(report, indent=2) + "\n")
    write_atomic(text, markdown(report))
    with atomic_path(picture) as temporary:
        plot(report, temporary)
    return [path, text, picture]
