"""``verify --integer-only``: its table, its exit codes and its mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile import cli
from tests.proof.programs import parsed
from tests.surface.plain import feeds

CLEAN = "g (uint8[B, T] x, uint8[T, 8] v) => (int32[B, 8] y) { y = MatMulInteger (x, v) }"
FLOAT = "g (uint8[4] x) => (int32[4] y) { f = Cast <to = 1> (x) r = Sqrt (f) y = Cast <to = 6> (r) }"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(parsed(CLEAN), "clean.onnx")
    onnx.save(parsed(FLOAT), "float.onnx")
    return tmp_path


def test_a_program_that_is_proven_has_exit_code_0(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "clean.onnx", "--integer-only", "--bound", "T=1024", "--bound", "B=8"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    rows = {line.split("  ")[0]: line for line in shown.out.splitlines()}
    for name in ("types", "grade", "optimised basic", "optimised extended", "optimised all", "intervals"):
        assert " ok " in rows[name], name
    assert "A: standard integer operators only" in rows["grade"]


def test_one_that_is_not_has_exit_code_1_and_lists_why(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "float.onnx", "--integer-only"]) == 1
    shown = capsys.readouterr()
    assert "'f' is float, read by Sqrt" in shown.out and "none: floats remain" in shown.out
    assert "verification of 'float.onnx' failed: types, grade" in shown.err


def test_a_dim_without_a_bound_is_named_with_the_option(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "clean.onnx", "--integer-only"]) == 1
    shown = capsys.readouterr()
    assert "a product over T, which has no bound; give the largest size with --bound T=N" in shown.out


def test_a_compiled_folder_has_its_other_checks_too(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = feeds(batch=2)
    np.savez("calib.npz", input_ids=given["input_ids"], attention_mask=given["attention_mask"])
    options = ["--recipe", "float", "--target", "plain", "--calib", "calib.npz", "-o", "out"]
    assert cli.main([str(model), *options]) == 0
    capsys.readouterr()
    assert cli.main(["verify", "out", "--calib", "calib.npz", "--integer-only"]) == 1
    shown = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in shown.splitlines()}
    assert " ok " in rows["interface"] and "FAILED" in rows["types"] and "FAILED" in rows["grade"]
    assert "LayerNormalization" in shown


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["clean.onnx", "--integer-only", "--bound", "TT=4"], "unknown dynamic dim 'TT'", "did you mean T?"),
        (["clean.onnx", "--integer-only", "--bound", "T"], "cannot read --bound 'T'", "NAME=N"),
        (["clean.onnx", "--integer-only", "--bound", "T=0"], "cannot read --bound 'T=0'", "NAME=N"),
        (["clean.onnx", "--integer-only", "--bound", "T=x"], "cannot read --bound 'T=x'", "NAME=N"),
        (["clean.onnx", "--bound", "T=4"], "says nothing without --integer-only", "add --integer-only"),
        (["clean.onnx", "--integer-only", "--model", "m.onnx"], "--model is for a compiled folder", "leave it out"),
        (["clean.onnx"], "'clean.onnx' is no compiled model", ""),
        (["missing.onnx", "--integer-only"], "'missing.onnx' is no compiled model", ""),
    ],
)
def test_a_mistake_has_exit_code_2(
    program: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], error: str, hint: str
) -> None:
    assert cli.main(["verify", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and error in shown.err and hint in shown.err


def test_a_file_that_is_no_model_is_a_mistake(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.onnx").write_bytes(b"nothing")
    assert cli.main(["verify", "bad.onnx", "--integer-only"]) == 2
    assert "not an ONNX model" in capsys.readouterr().err
