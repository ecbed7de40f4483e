"""The kernels of this processor against NumPy: integers exactly, floats to a bound that is written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.backends.tvm.operands import drawn, integers, low_bit, opened, tvm

from qcompile.backends.tvm.kernels import (  # isort: skip
    features, host_target, matmul_integer, matmul_nbits, matmul_nbits_int8, matmul_w4a8, pack_integer,
)  # fmt: skip
from qcompile.backends.tvm.kernels import reference
from qcompile.calibration.runner import open_session
from qcompile.errors import UserError

ROWS = (1, 3, 17)
PLAIN = "llvm"
VNNI = {"kind": "llvm", "mattr": ["+avx512f", "+avx512bw", "+avx512dq", "+avx512vl", "+avx512vnni"]}
SUM_ERROR = 2e-6  # of the largest |y|: float32 sums of some hundred terms


def targets() -> list[Any]:
    """What this processor runs: its own units, VNNI where it has AMX too, and no unit at all."""
    host = host_target()
    own = {"amx": [host, VNNI], "vnni": [host]}.get(features(host).unit, [host])
    return [*own, PLAIN] if features(host).unit != "plain" else [PLAIN]


TARGETS = [pytest.param(target, id=features(target).unit) for target in targets()]


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() <= SUM_ERROR * np.abs(expected).max())


@pytest.mark.parametrize("x_dtype", ("uint8", "int8"))
@pytest.mark.parametrize(("k", "n"), ((67, 33), (128, 64)))
@pytest.mark.parametrize("target", TARGETS)
def test_matmul_integer_is_exact(target: Any, k: int, n: int, x_dtype: str) -> None:
    weight = integers("int8", k, n)
    run = opened(matmul_integer(k, n, x_dtype, target), target)
    for rows in (*ROWS, 32, 150):
        x = integers(x_dtype, rows, k, seed=rows)
        y = run((x, pack_integer(weight)), (rows, n), "int32")
        assert (y == reference.matmul_integer(x, weight)).all()


SHAPES = ((203, 33, 4, 32, True), (96, 20, 3, 64, False), (70, 48, 2, None, True), (130, 17, 8, 32, False))
# AMX has no part in these; a plain processor's code is the same for all of them but for the width
WEIGHTS = [pytest.param(targets()[0], *shape, id=f"{shape[2]}-bits") for shape in SHAPES]
WEIGHTS += [pytest.param(PLAIN, *shape, id=f"{shape[2]}-bits-plain", marks=pytest.mark.slow) for shape in SHAPES[1::2]]


@pytest.mark.parametrize(("target", "k", "n", "bits", "group", "symmetric"), WEIGHTS)
def test_matmul_nbits(target: Any, k: int, n: int, bits: int, group: int | None, symmetric: bool) -> None:
    held = low_bit(k, n, bits, group, symmetric=symmetric)
    run = opened(matmul_nbits(k, n, bits, group, target, zero_points=not symmetric), target)
    for rows in ROWS:
        x = drawn(rows).standard_normal((rows, k)).astype(np.float32)
        expected = reference.matmul_nbits(x, held.codes, held.scale, held.zero, held.rows)
        assert close(run((x, *held.packed()), (rows, n), "float32"), expected)


@pytest.mark.parametrize(("target", "k", "n", "bits", "group", "symmetric"), WEIGHTS)
def test_matmul_nbits_int8(target: Any, k: int, n: int, bits: int, group: int | None, symmetric: bool) -> None:
    held = low_bit(k, n, bits, group, symmetric=symmetric)
    run = opened(matmul_nbits_int8(k, n, bits, group, target, zero_points=not symmetric), target)
    for rows in ROWS:
        x = drawn(rows).standard_normal((rows, k)).astype(np.float32)
        x[0, :40] = 0  # a block of zeros has a step too
        expected = reference.matmul_nbits_int8(x, held.codes, held.scale, held.zero, held.rows)
        assert close(run((x, *held.packed()), (rows, n), "float32"), expected)


@pytest.mark.parametrize("x_dtype", ("uint8", "int8"))
@pytest.mark.parametrize(("target", "k", "n", "bits", "group", "symmetric"), [*WEIGHTS[:2], WEIGHTS[-1]])
def test_matmul_w4a8(
    target: Any, k: int, n: int, bits: int, group: int | None, symmetric: bool, x_dtype: str
) -> None:
    held = low_bit(k, n, bits, group, symmetric=symmetric)
    kernel = matmul_w4a8(k, n, bits, group, target, x_dtype=x_dtype, zero_points=not symmetric)
    run = opened(kernel, target)
    for rows in ROWS:
        x, step = integers(x_dtype, rows, k, seed=rows), drawn(rows).uniform(0.1, 1, rows).astype(np.float32)
        zero = drawn(rows).integers(0, 256, rows).astype(np.int32) * (x_dtype == "uint8")
        tokens = (x, step) if x_dtype == "int8" else (x, step, zero)
        y = run((*tokens, *held.packed(sums=x_dtype == "uint8")), (rows, n), "float32")
        assert close(y, reference.matmul_w4a8(x, step, zero, held.codes, held.scale, held.zero, held.rows))


def test_whole_numbers_pass_through_floats_exactly() -> None:
    """With steps and scales of 1 the float kernels compute integers below 2^24, which no sum rounds."""
    k, n, rows = 96, 40, 5
    held = low_bit(k, n, 4, 32, symmetric=False)
    scale = np.ones_like(held.scale)
    x, step = integers("int8", rows, k), np.ones(rows, np.float32)
    target = host_target()
    packed = (held.packed()[0], scale_panels(scale, held), held.packed()[2])
    y = opened(matmul_w4a8(k, n, 4, 32, target), target)((x, step, *packed), (rows, n), "float32")
    zeros = held.zero[np.arange(k) // 32].astype(np.int32)
    assert (y == x.astype(np.int32) @ (held.codes.astype(np.int32) - zeros)).all()


def scale_panels(scale: np.ndarray, held: Any) -> np.ndarray:
    from qcompile.backends.tvm.kernels.api import layout_of
    from qcompile.backends.tvm.kernels.packing import pack_columns

    return pack_columns(scale, layout_of(held.codes.shape[0], held.codes.shape[1], held.bits, held.group), "float32")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: matmul_integer(64, 64, "int16", "llvm"), "no kernel"),
        (lambda: matmul_integer(70_000, 64, "int8", "llvm"), "leave int32"),
        (lambda: matmul_nbits(64, 64, 5, 32, "llvm"), "5 bits"),
        (lambda: matmul_nbits(64, 64, 4, 24, "llvm"), "24 rows"),
        (lambda: pack_integer(np.zeros((4, 4), np.uint8)), "uint8"),
    ],
)
def test_what_has_no_kernel_is_refused(call: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call()


def test_onnxruntime_computes_the_same_after_a_kernel_of_one_row() -> None:
    """It was wrong when the kernel left its tiles configured; that ONNX Runtime went on with these is unproven."""
    k, n, rows = 128, 64, 20
    target, weight, x = host_target(), integers("int8", k, n), integers("uint8", rows, k)
    session = onnx_product(x, weight)
    run = opened(matmul_integer(k, n, "uint8", target), target)
    run((x[:1], pack_integer(weight)), (1, n), "int32")
    assert (session() == reference.matmul_integer(x, weight)).all()


def onnx_product(x: np.ndarray, weight: np.ndarray) -> Callable[[], np.ndarray]:
    """MatMulInteger of ONNX Runtime."""
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = open_session(model.SerializeToString(), threads=1)
    return lambda: np.asarray(session.run(None, {"x": x})[0])


def test_the_units_are_in_the_machine_code() -> None:
    host = host_target()
    expected = {"amx": "tdpbusd", "vnni": "vpdpbusd", "sdot": "sdot"}.get(features(host).unit)
    if expected is None:
        pytest.skip("this processor has no integer dot product")
    from qcompile.backends.tvm.kernels.program import compiled

    code = compiled([matmul_integer(128, 64, "uint8", host)], host).mod.inspect_source("asm")
    assert code.count(expected) >= 4
    assert isinstance(tvm.__version__, str)


@pytest.mark.skipif(not features(host_target()).wide, reason="this processor has no AVX-512 VNNI")
def test_one_row_asks_for_weights_in_advance_and_many_do_not() -> None:
    from qcompile.backends.tvm.kernels.program import compiled

    host = host_target()
    kernel = matmul_nbits(128, 64, 4, 32, host, zero_points=False)  # blocks of 12, 4 and 1 rows
    code = compiled([kernel], host).mod.inspect_source("asm")
    assert 0 < code.count("prefetcht0") < 12
