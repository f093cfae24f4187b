"""``lit-reduce list``: what it shows of plug-ins that are no plug-ins."""

import os

from lit_reduce.commands.list import main as list_command
from lit_reduce.plugin import CONFIG


def test_the_list_shows_a_pipe_as_damaged(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints" / "pipe").mkdir(parents=True)
    os.mkfifo(tmp_path / "checkpoints" / "pipe" / CONFIG)
    monkeypatch.chdir(tmp_path)
    list_command([])
    assert "checkpoints/pipe" in capsys.readouterr().out
