"""Where training gets its pictures and questions: a reference's own, or JSON-lines files of the user."""

from collections.abc import Iterable

from lit_reduce.data.groups import Group, group_rows
from lit_reduce.data.jsonl import Row, read_rows
from lit_reduce.data.questions import scored_rows
from lit_reduce.errors import UserError
from lit_reduce.registry import references
from lit_reduce.settings.train import DataSettings

HELD_OUT = 20  # one picture in so many validates where the user gives no file for that


def training_groups(data: DataSettings) -> tuple[list[Group], list[Group]]:
    """Training and validation pictures with their questions.

    Raises:
        UserError: A file that is not usable, or a single picture.
    """
    reference = references().get(data.name)
    if reference is not None and reference.training is not None:
        made = reference.training
        return made("train", data.images, data.turns), made("val", data.val_images, data.turns)
    groups = group_rows(read_rows(data.name))
    if data.val is not None:
        return groups, group_rows(read_rows(data.val))
    held = max(1, len(groups) // HELD_OUT)
    if len(groups) < 2:
        raise UserError(f"data {data.name}: one picture cannot both train and validate; give more, or data.val=FILE")
    return groups[:-held], groups[-held:]


def table_rows(data: DataSettings) -> tuple[Iterable[Row], int]:
    """The questions of the table, and how many: ``data.test``, the test questions of a reference, or ``data.val``.

    Raises:
        UserError: There are none, or they have no answers.
    """
    source = data.test or (data.name if data.name in references() else data.val)
    if source is None:
        raise UserError("no questions to score on: give data.test=FILE.jsonl with image, prompt and answer")
    return scored_rows(source, data.test_rows)
