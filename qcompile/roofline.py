"""A lower bound on a model's time: the work of its matmuls at the GEMM rates that this machine reaches.

Linears count 2 * tokens * weights, attention products as written; everything else is free. Attention stays in
float, because its operands are activations whose quantisation costs what it saves.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.calibration.runner import run_session
from qcompile.environment import require_onnxruntime
from qcompile.pipeline import Arrays

BUDGET_S = 0.5  # time spent on measuring one rate
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")
_OPAQUE = ("Attention", "MultiHeadAttention", "GroupQueryAttention", "EinSum", "Conv", "MatMulNBits")


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations of one run, and the (M, K, N) of the linear with the most of them.

    ``uncounted``: operators that multiply matrices but whose work is not in the figures.
    """

    linear: float
    attention: float
    shape: tuple[int, int, int]
    uncounted: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Rates:
    """Operations per second of one thread group on ``Work.shape``: float32, and uint8 x int8."""

    fp32: float
    u8s8: float


def work(model: Path, feeds: Arrays) -> Work:
    """Count by running the unoptimised ``model`` once under ONNX Runtime's profiler, which reports shapes."""
    linear, attention = 0.0, 0.0
    largest: tuple[float, tuple[int, int, int]] = (0.0, (0, 0, 0))
    uncounted: Counter[str] = Counter()
    for op, inputs, output in _profiled(model, feeds):
        if op in _OPAQUE:
            uncounted[op] += 1
        if op not in _PRODUCTS or len(inputs) < 2 or not inputs[0]:
            continue
        operations = 2.0 * float(np.prod(output)) * inputs[0][-1]
        if len(inputs[1]) == 2:  # weights are matrices; both operands of attention have a batch axis
            linear += operations
            rows = int(np.prod(output[:-1]))
            largest = max(largest, (operations, (rows, inputs[0][-1], output[-1])))
        else:
            attention += operations
    return Work(linear, attention, largest[1], dict(uncounted))


def _profiled(model: Path, feeds: Arrays) -> list[tuple[str, list[list[int]], list[int]]]:
    """Operator, input shapes and output shape of every node that ran."""
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights have no shape
    options.enable_profiling = True
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        run_session(session, None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [_event(e["args"]) for e in events if "output_type_shape" in e.get("args", {})]


def _event(args: dict[str, Any]) -> tuple[str, list[list[int]], list[int]]:
    inputs = [next(iter(item.values())) for item in args["input_type_shape"] if item]
    outputs = [next(iter(item.values())) for item in args["output_type_shape"] if item]
    return args["op_name"], inputs, outputs[0] if outputs else []


def rates(shape: tuple[int, int, int], threads: int) -> Rates:
    """The best GEMM rates on (M, K, N) with constant weights, measured with one-node graphs."""
    rows, inner, columns = shape
    generator = np.random.default_rng(0)
    operations = 2.0 * rows * inner * columns
    x = generator.standard_normal((rows, inner)).astype(np.float32)
    w = generator.standard_normal((inner, columns)).astype(np.float32)
    codes = generator.integers(0, 255, (rows, inner)).astype(np.uint8)
    weights = generator.integers(-127, 128, (inner, columns)).astype(np.int8)
    return Rates(
        fp32=operations / _fastest(_product("MatMul", x, w, ir.DataType.FLOAT, threads)),
        u8s8=operations / _fastest(_product("MatMulInteger", codes, weights, ir.DataType.INT32, threads)),
    )


def _product(op: str, x: np.ndarray, w: np.ndarray, result: ir.DataType, threads: int) -> Callable[[], Any]:
    from qcompile.calibration.runner import open_session

    left = ir.Value(name="x", type=ir.TensorType(ir.DataType.from_numpy(x.dtype)), shape=ir.Shape(x.shape))
    right = ir.Value(name="w", const_value=ir.tensor(w, name="w"))
    node = ir.node(op, [left, right])
    node.outputs[0].name = "y"
    node.outputs[0].type = ir.TensorType(result)
    graph = ir.Graph(
        [left], node.outputs, nodes=[node], initializers=[right], opset_imports={"": 21}, name="gemm"
    )
    model = ir.Model(graph, ir_version=10)
    session = open_session(ir.to_proto(model).SerializeToString(), threads=threads)
    return lambda: session.run(None, {"x": x})


def _fastest(run: Callable[[], Any]) -> float:
    """Seconds of the fastest run within the budget, after one to warm up."""
    run()
    best, end = float("inf"), time.perf_counter() + BUDGET_S
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
