"""Answering a batch of rows, as records for a file of answers."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from lit_reduce.backbones import Backbone
from lit_reduce.data.jsonl import Row
from lit_reduce.errors import UserError
from lit_reduce.inference.spec import ReducerSpec, generate, visual_counts


def answer_batch(
    backbone: Backbone, spec: ReducerSpec, rows: Sequence[Row], max_new_tokens: int, on_error: str = "stop"
) -> list[dict[str, Any]]:
    """Answer rows in one ``generate``.

    Args:
        backbone: The model.
        spec: The reducer and its budget.
        rows: The questions.
        max_new_tokens: The longest answer.
        on_error: With ``record`` a picture that does not open becomes an ``error`` in its record.

    Returns:
        For each row ``answer``, ``visual_tokens`` and ``kept_tokens``.

    Raises:
        UserError: With ``on_error="stop"``, a picture does not open.
    """
    records: list[dict[str, Any]] = [{} for _ in rows]
    good: list[tuple[dict[str, Any], Row, Image.Image]] = []
    for record, row in zip(records, rows, strict=True):
        try:
            good.append((record, row, row.open()))
        except UserError as error:
            if on_error == "stop":
                raise
            record["error"] = str(error)
    if not good:
        return records
    inputs = backbone.prepare([picture for _, _, picture in good], [row.prompt for _, row, _ in good])
    answers, prompt_map = generate(backbone, inputs, spec, max_new_tokens)
    totals = visual_counts(backbone, inputs)
    kept = totals if prompt_map is None else prompt_map.kept
    for (record, _, _), answer, total, stayed in zip(good, answers, totals, kept, strict=True):
        record |= {"answer": answer, "visual_tokens": total, "kept_tokens": stayed}
    return records
