"""The examples run, and so does the example of the README, with a tiny model in place of the one on the hub."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def test_attach_to_huggingface(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("attach_to_huggingface").main([])
    assert "divprune: 9 of 36 visual tokens" in capsys.readouterr().out


def test_train_for_your_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("train_for_your_backbone").main([])
    out = capsys.readouterr().out
    assert "'reducer.safetensors'" in out
    assert "answer:" in out


def test_write_a_reducer() -> None:
    register = importlib.import_module("lit_reduce.reducer")._REGISTER
    before = dict(register)
    try:
        assert importlib.import_module("write_a_reducer").main() == {"longest_tokens": 6, "tiny_scorer": 6}
    finally:  # the matrices run what is in the register
        register.clear()
        register.update(before)


def test_the_example_of_the_readme(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny: Any = importlib.import_module("tiny_llava")
    code = next(block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    assert "llava-hf/llava-1.5-7b-hf" in code
    assert len(code.strip().splitlines()) <= 14
    monkeypatch.setattr("transformers.LlavaForConditionalGeneration.from_pretrained", lambda name: tiny.model())
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda name: tiny.processor())
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 48), "red").save("a.png")
    exec(code.replace("keep=64", "keep=16"), {})  # 36 tokens, of which 64 would be too many
    assert "16 of 36" in capsys.readouterr().out
