"""What importing the package costs and offers."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lit_reduce

ROOT = Path(lit_reduce.__file__).parents[1]


def modules_after(code):
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_itself_is_light():
    assert "torch" not in modules_after("import lit_reduce")


def test_the_plugin_side_loads_without_model_libraries():
    loaded = modules_after("import lit_reduce\nlit_reduce.available()\nlit_reduce.load_plugin, lit_reduce.Budget")
    assert "torch" in loaded
    assert not {"transformers", "lightning", "omegaconf"} & loaded


def test_every_promised_name_exists_and_others_do_not():
    for name in lit_reduce.__all__:
        assert getattr(lit_reduce, name) is not None
        assert name in dir(lit_reduce)
    with pytest.raises(AttributeError, match="no attribute 'attache'"):
        _ = lit_reduce.attache


def test_the_version_is_that_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert lit_reduce.__version__ == project["version"]
