"""One table of codes for the embedding and the tied head, in every scheme."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.backends.onnxruntime_cpu import OnnxRuntimeCpu
from qcompile.calibration.runner import open_session
from qcompile.graph.workspace import Workspace
from tests.backends.ground import INT8, Feeds, Program, graph, lower, normal, per_token, static, weight_only

V, C = 70, 32
TOLERANCE = 2e-6


def tied() -> ir.Model:
    text = f"""g (int64[batch, seq] ids) => (float[batch, seq, {V}] logits) {{
        x = Gather(table, ids)
        n = LayerNormalization <axis = -1> (x, gain, shift)
        turned = Transpose <perm = [1, 0]> (table)
        logits = MatMul(n, turned)
    }}"""
    return graph(text, table=normal(V, C), gain=normal(C, seed=1), shift=normal(C, seed=2))


def ids(batch: int, length: int) -> Feeds:
    return {"ids": (normal(batch, length, seed=3) * 1000).astype("int64") % V}


Quantiser = Callable[[ir.Model, Workspace], None]
CASES: dict[str, tuple[Quantiser, str]] = {
    "static": (static(), "QGemm"),
    "per token": (per_token(8, symmetric=False), "QGemm"),
    "per token, symmetric": (per_token(8, symmetric=True), "QGemm"),
    "weight only": (weight_only(INT8), "MatMul"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Program, str]:
    quantise, kernel = CASES[request.param]
    return lower(tied(), tmp_path / "p", quantise), kernel


def test_head_and_embedding_share_their_codes(case: tuple[Program, str]) -> None:
    program, kernel = case
    assert [k["kernel"] for k in program.kernels] == [kernel]
    tables = [v for v in program.written.graph.initializers.values() if v.const_value and v.const_value.size >= V * C]
    assert [v.dtype for v in tables] == [ir.DataType.INT8]
    for shape in ((1, 1), (3, 5)):
        assert program.difference(ids(*shape)) < TOLERANCE


def test_only_the_rows_that_are_looked_up_become_floats(case: tuple[Program, str]) -> None:
    program, _ = case
    assert "DequantizeLinear" not in program.operators()


def test_a_packed_head_and_the_embedding_share_their_bytes(tmp_path: Path) -> None:
    program = lower(tied(), tmp_path / "p", weight_only(INT8), OnnxRuntimeCpu(accuracy_level=4))
    assert [k["kernel"] for k in program.kernels] == ["MatMulNBits"]
    tables = [v for v in program.written.graph.initializers.values() if v.const_value and v.const_value.size >= V * C]
    assert [v.dtype for v in tables] == [ir.DataType.UINT8]
    for shape in ((1, 1), (3, 5)):
        assert program.difference(ids(*shape)) < 0.01  # the head's input is rounded to 8 bits
    lookups = [n for n in program.written.graph if n.op_type == "Gather"]
    exact = lower(tied(), tmp_path / "q", weight_only(INT8))
    assert lookups and program.entry.facts["accuracy_level"] == 4
    np.testing.assert_array_equal(embedded(program.path), embedded(exact.path))


def embedded(program: Path) -> np.ndarray:
    """What ``program`` looks up for every id."""
    model = ir.load(program)
    model.graph.outputs[:] = [next(n for n in model.graph if n.op_type == "LayerNormalization").inputs[0]]  # type: ignore[list-item]
    ir.save(model, program.with_name("embedding.onnx"))
    return np.asarray(
        open_session(program.with_name("embedding.onnx")).run(None, {"ids": np.arange(V)[None]})[0]
    ).reshape(V, C)


def test_a_float_head_is_the_recipes_choice(tmp_path: Path) -> None:
    program = lower(tied(), tmp_path / "p")
    assert [k["reason"] for k in program.kernels] == ["kept in float by the recipe"]
