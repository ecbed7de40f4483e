"""The program as it is written: names, kernels, bytes, and every architecture."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from qcompile.backends import by_name, onnxruntime_cpu
from qcompile.backends.base import open_program
from tests.backends.ground import Program, graph, lower, normal, static

K = 32


def two_layers() -> ir.Model:
    text = f"""g (float[batch, seq, {K}] x) => (float[batch, seq, {K}] y) {{
        h = MatMul(x, w0)
        r = Relu(h)
        y = MatMul(r, w1)
    }}"""
    model = graph(text, w0=normal(K, K), w1=normal(K, K, seed=1))
    for node, name in zip(model.graph, ("up", "", "down"), strict=True):
        node.metadata_props["qcompile.layer"] = name
    return model


def test_the_target_is_found_by_its_name() -> None:
    assert by_name("cpu").target.backend == "onnxruntime"


def test_kernels_speak_in_the_names_of_the_users_model(tmp_path: Path) -> None:
    integer = lower(two_layers(), tmp_path / "a", static()).kernels
    assert [(k["site"], k["kernel"], k["low_bit"]) for k in integer] == [
        ("up", "MatMulIntegerToFloat", True),
        ("down", "MatMulIntegerToFloat", True),
    ]
    floats = lower(two_layers(), tmp_path / "b").kernels
    assert [(k["site"], k["low_bit"], k["reason"]) for k in floats] == [
        ("up", False, "kept in float by the recipe"),
        ("down", False, "kept in float by the recipe"),
    ]


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (lower(two_layers(), tmp_path / name, static()) for name in "ab")
    assert first.path.read_bytes() == second.path.read_bytes()


@pytest.mark.parametrize("limit", [0, 2**20])
def test_large_programs_keep_their_tensors_beside_them(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_cpu, "EXTERNAL_BYTES", limit)
    program: Program = lower(two_layers(), tmp_path / "p", static())
    written = sorted(path.name for path in program.folder.iterdir())
    assert written == ["model.onnx"] + ["model.onnx.data"] * (limit == 0)
    assert open_program(program.folder)({"x": normal(2, 3, K)})["y"].shape == (2, 3, K)
