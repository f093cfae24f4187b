"""The data of distillation: runs that start together share the making of the teacher's outputs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lit_reduce.data.groups import Group
from lit_reduce.distill.data import DistillData


def test_what_is_missing_is_made_once_in_an_order_of_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [Group(str(i), lambda: Image.new("RGB", (4, 4)), (("what ?", None),)) for i in range(12)]
    orders = []
    for process in (b"one", b"another"):
        made: list[str] = []
        folder = tmp_path / process.decode()
        folder.mkdir()
        (folder / "3.safetensors").touch()  # another run was faster
        monkeypatch.setattr("lit_reduce.distill.data.os.urandom", lambda _, process=process: process)
        teacher: Any = SimpleNamespace(cache=folder, outputs=lambda group, made=made: made.append(group.key))
        DistillData(teacher, groups[:10], groups[10:]).prepare_data()
        orders.append(made)
    assert sorted(orders[0]) == sorted(orders[1]) == sorted({str(i) for i in range(12)} - {"3"})
    assert orders[0] != orders[1]
