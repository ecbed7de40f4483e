"""--resume: a compilation that was killed while it learned goes on, and ends with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcompile
from qcompile.block import learned
from qcompile.errors import UserError
from qcompile.models.architectures import cached_export


def compiled(folder: Path, resume: Path | None) -> dict[str, bytes]:
    """The files of the program; learning is short."""
    model = str(cached_export("bert"))
    passes = "omniquant{epochs=1}"
    with qcompile.compile(model, recipe="w4a4", passes=passes, max_samples=2, output=folder, resume=resume):
        return {path.name: path.read_bytes() for path in folder.glob("model.onnx*")}


def test_a_killed_compilation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compiled(tmp_path / "whole", None)
    seen: list[str] = []
    choose = learned._choose

    def dying(*arguments: object) -> None:
        seen.append("block")
        if len(seen) == 2:
            raise KeyboardInterrupt
        choose(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(learned, "_choose", dying)
    with pytest.raises(KeyboardInterrupt):
        compiled(tmp_path / "out", tmp_path / "work")
    assert not (tmp_path / "out").exists()
    assert compiled(tmp_path / "out", tmp_path / "work") == whole
    assert len(seen) == 3


def test_a_file_is_no_place_to_keep_blocks(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("")
    with pytest.raises(UserError, match="is no folder"):
        compiled(tmp_path / "out", tmp_path / "work")
