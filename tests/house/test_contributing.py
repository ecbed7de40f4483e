"""The worked example of CONTRIBUTING.md is a pass that works, with tests that pass and that can fail."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- file: (\S+) -->\n```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A folder with the example's files, as CONTRIBUTING.md prints them."""
    blocks = dict(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()))
    assert blocks.keys() == {"fold_scale.py", "test_fold_scale.py"}
    for name, code in blocks.items():
        (tmp_path / name).write_text(code)
    return tmp_path


def test_the_example_passes_its_own_tests(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _import_as(monkeypatch, "qcompile.passes.fold_scale", example / "fold_scale.py")
    tests = _import_as(monkeypatch, "test_fold_scale", example / "test_fold_scale.py")
    found = [value for name, value in vars(tests).items() if name.startswith("test_")]
    assert len(found) == 2
    for test in found:
        test()


def test_the_example_keeps_the_style(example: Path) -> None:
    ruff = [sys.executable, "-m", "ruff"]
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", str(example)]
    checked = subprocess.run([*ruff, "check", *config], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    formatted = subprocess.run([*ruff, "format", "--diff", *config], capture_output=True, text=True)
    assert formatted.returncode == 0, formatted.stdout


def _import_as(monkeypatch: pytest.MonkeyPatch, name: str, path: Path) -> object:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
