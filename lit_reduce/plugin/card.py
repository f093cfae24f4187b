"""The model card of a plug-in, generated from its config."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_USE = """\
```bash
python predict.py backbone={base} reducer=PATH_OR_HUB_ID keep={keep} image=a.png prompt="What is it?"
```

```python
from lit_reduce import attach

with attach(model, "PATH_OR_HUB_ID", keep={keep}):
    output = model.generate(**inputs)
```"""


def model_card(
    config: Mapping[str, Any], paper: str, parameters: int, extra: Mapping[str, Any], unit: str = "image"
) -> str:
    """Generate the model card: Markdown with the YAML header that the hub reads.

    Args:
        config: ``PluginConfig`` as a dict.
        paper: Source of the method.
        parameters: Number of weights of the reducer.
        extra: More header entries, and ``notes``, text for the body.
        unit: What a budget applies to: an image, or a tile of an image.
    """
    from huggingface_hub import ModelCardData

    backbone = config["backbone"]
    name, base = config["reducer"], short_id(backbone["id"])
    header: dict[str, Any] = {
        "library_name": "lit_reduce",
        "base_model": base,
        "base_model_relation": "adapter",
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
        **{key: value for key, value in extra.items() if key not in ("notes", "tags")},
        "tags": ["lit_reduce", "visual-token-reduction", name, *extra.get("tags", ())],
    }
    budgets = ", ".join(str(count) for count in config["budgets"]) or "none"
    parts = [
        f"---\n{ModelCardData(ignore_metadata_errors=True, **header).to_yaml()}\n---",
        f"# {name} for {base}",
        f"A lit_reduce plug-in: of an image's {_whole(backbone['tokens'])} it keeps a few.",
        "\n".join(
            [
                f"- Backbone: `{base}` ({backbone['family']}, width {backbone['hidden_size']}); others are refused",
                f"- Its weights: SHA-256 `{backbone['hash']}`",
                f"- Budgets trained: {budgets} tokens per {unit}",
                f"- Positions of the kept tokens: {config['positions']}",
                f"- Size: {parameters:,} parameters",
                f"- Written by lit_reduce {config['library_version']}",
                *([f"- Method: {paper}"] if paper else []),
            ]
        ),
        "## Measured",
        metrics_table(config["metrics"]),
        "## Use",
        _USE.format(base=base, keep=_usual(config["budgets"])),
    ]
    if extra.get("notes"):
        parts.append(str(extra["notes"]).strip())
    return "\n\n".join(parts) + "\n"


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Markdown table with a row per budget and a column per metric; single values follow as a list.

    Args:
        metrics: ``{column: {budget: value}}`` and ``{name: value}``. A value of three numbers is an estimate and its
            interval.
    """
    columns = {
        key: {str(budget): value for budget, value in column.items()}
        for key, column in metrics.items()
        if isinstance(column, Mapping)
    }
    single = {key: value for key, value in metrics.items() if key not in columns}
    if not metrics:
        return "Nothing measured yet."
    lines: list[str] = []
    if columns:
        budgets = sorted({budget for column in columns.values() for budget in column}, key=_descending)
        lines += ["| tokens | " + " | ".join(columns) + " |", "|---:|" + "---:|" * len(columns)]
        rows = ([budget, *(_shown(column.get(budget)) for column in columns.values())] for budget in budgets)
        lines += [f"| {' | '.join(row)} |" for row in rows]
    if columns and single:
        lines.append("")
    lines += [f"- {key}: {_shown(value)}" for key, value in single.items()]
    return "\n".join(lines)


def short_id(backbone: str) -> str:
    """A hub id or name unchanged; of a local path only its last part."""
    path = Path(backbone)
    local = path.is_absolute() or len(path.parts) > 2 or backbone.startswith(".") or path.is_dir()
    return path.name if local else backbone


def _usual(budgets: Sequence[float]) -> float:
    """Budget for the example: 64, or the nearest one that was trained."""
    return min(max(64, min(budgets)), max(budgets)) if budgets else 64


def _whole(tokens: int) -> str:
    return f"{tokens} visual tokens" if tokens else "visual tokens, the more the larger it is,"


def _descending(budget: str) -> tuple[float, str]:
    try:
        return -float(budget), ""
    except ValueError:
        return float("-inf"), budget  # "all" and other words come first


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        first, *rest = [_shown(item) for item in value]
        return f"{first} ({' to '.join(rest)})" if rest else first
    return f"{value:.4g}" if isinstance(value, float) else str(value)
