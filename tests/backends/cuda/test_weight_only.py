"""A product of float32 and 4-bit codes in a CUDA program: which kernel each number of rows takes, and its numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason='TVM is not installed: pip install "qcompile-nn[tvm]"')

from qcompile.backends.cuda.forecast import GPUS, costs, forecast
from qcompile.backends.cuda.native import Native
from qcompile.backends.gpu.program import Session
from tests.backends.cuda.emulated import Emulated

K, N, GROUP = 96, 40, 32
needs_tools = pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("g++") is None, reason="the source is compiled by nvcc and by g++"
)


def matrix() -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 (K, N) of 4 bits and scales (K / GROUP, N)."""
    rng = np.random.default_rng(3)
    return rng.integers(-8, 8, (K, N)).astype(np.int8), rng.uniform(0.01, 0.1, (K // GROUP, N)).astype(np.float32)


def written(folder: Path) -> Path:
    codes, scale = matrix()
    graph = onnx.parser.parse_graph(f"""
        product (float[rows, {K}] x) => (float[rows, {N}] y) {{
            w = DequantizeLinear <axis = 0, block_size = {GROUP}> (codes, scale)
            y = MatMul (x, w)
        }}""")
    for name, array in (("codes", codes), ("scale", scale)):
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    Native("sm_80").package(ir.serde.deserialize_model(model), folder)
    return folder


@needs_tools
def test_rows_and_tensor_cores(tmp_path: Path) -> None:
    folder = written(tmp_path)
    described = json.loads((folder / "program.json").read_text())
    assert [kernel["kernel"] for kernel in described["kernels"]] == ["w4_gemm"]
    assert all(kernel["spilled"] == 0 for kernel in described["resources"])
    session = Session(folder, Emulated(folder / "program.cu", tmp_path))
    codes, scale = matrix()
    weight = codes.astype(np.float64) * np.repeat(scale, GROUP, axis=0)
    for rows, kernel in ((1, "rows"), (8, "rows"), (9, "gemm"), (33, "gemm")):
        x = np.random.default_rng(rows).normal(size=(rows, K)).astype(np.float32)
        (found,) = session.run(None, {"x": x})
        assert np.abs(found - x @ weight).max() < 1e-5
        (cost,) = costs(described, [x.shape], GPUS["sm_80"])
        assert cost.kernel.endswith(kernel)


def test_a_forecast_is_the_longer_of_bytes_and_operations() -> None:
    """Launches of 1000 x 1000 floats: one reads and writes them, one multiplies them on 108 blocks, one is empty."""
    side, number = 1000, [["number", 1000]]
    described = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["rows", side]}],
        "variables": [[0, 0]],
        "expressions": [number, [["number", 10**6]], [["number", 10**9]], [["number", 108]], [["number", 0]]],
        "slots": [{"dims": [0, 0], "dtype": "float32"}] * 2,
        "launches": [
            {"kernel": "add_kernel", "grid": 3, "block": 1, "arguments": [["tensor", 0], ["tensor", 1]], "work": 1},
            {"kernel": "w4_x_gemm", "grid": 3, "block": 1, "arguments": [["tensor", 0], ["int32", 0]], "work": 2},
            {"kernel": "w4_x_rows", "grid": 4, "block": 1, "arguments": [["tensor", 0]], "work": 2},
        ],
    }
    gpu = GPUS["sm_80"]
    found = forecast(described, [[side, side]], gpu)
    moved, operations = 8e6 / gpu.memory, 3 * 2e9 / gpu.units["bfloat16"]
    assert (found["launches"], found["bytes"]) == (2, 12 * 10**6)
    assert found["predicted_us"] == pytest.approx(1e6 * (moved + operations), abs=0.1)
    assert found["longest"][0]["kernel"] == "w4_x_gemm"
