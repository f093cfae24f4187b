"""Two processes on the CPU (gloo) end with the weights of one process that has twice the pictures in a step."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lit_reduce.backbones import Backbone
from lit_reduce.data.groups import Group
from lit_reduce.distill.teacher import Teacher
from lit_reduce.distill.trainer import fit

ROOT = Path(__file__).parents[2]


def four_groups() -> list[Group]:
    """Three pictures, two to train on; made anew in every process."""
    generator = torch.Generator().manual_seed(9)
    turns = [("what is the red w30 here ?", "w40 w41"), ("is big ?", "w50"), ("what ?", "w60 w61 w62")]
    pictures = [Image.fromarray(torch.randint(0, 256, (24, 24, 3), generator=generator).byte().numpy()) for _ in "abc"]
    return [Group(f"g{i}", picture.copy, tuple(turns[i:] + turns[:i])) for i, picture in enumerate(pictures)]


def test_two_processes_equal_one_with_twice_the_pictures(
    tiny: Backbone, teacher: Teacher, make: Any, tmp_path: Path
) -> None:
    (tmp_path / "two").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("pair.py")), str(tmp_path / "two"), str(port)]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pair:
        chosen = make.settings(tmp_path / "one", pictures=2)
        reducer = make.reducer()
        _, average = fit(chosen, tiny.model, reducer, make.data(teacher, four_groups(), chosen), tmp_path / "one")
        said, _ = pair.communicate(timeout=600)
    assert pair.returncode == 0, said
    for rank in (0, 1):
        found = torch.load(tmp_path / "two" / f"rank{rank}.pt")
        for name, weight in reducer.state_dict().items():
            torch.testing.assert_close(found["weights"][name], weight, atol=1e-5, rtol=0)
            torch.testing.assert_close(found["average"][name], average.average[name], atol=1e-5, rtol=0)
    start = make.reducer().state_dict()
    moved = [float((weight.detach() - start[name]).abs().max()) for name, weight in reducer.named_parameters()]
    assert min(moved) > 1e-3  # far more than the tolerance
    log = [(tmp_path / kind / "log" / "metrics.csv").read_text() for kind in ("one", "two")]
    assert log[0].count("\n") == log[1].count("\n") > 2
