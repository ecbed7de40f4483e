"""What every test of the surface stands on: the plain target and a tiny model in an empty folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile import backends
from tests.surface.plain import write_model


@pytest.fixture(autouse=True)
def plain_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.TARGETS, "plain", "tests.surface.plain:Plain")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model; the current folder is the one it is in."""
    monkeypatch.chdir(tmp_path)
    return write_model(tmp_path / "tiny.onnx")
