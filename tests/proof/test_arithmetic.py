"""Every elementwise rule against ONNX Runtime, on every pair of numbers of hundreds of pairs of intervals."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.calibration.runner import open_session
from qcompile.proof.intervals import find_intervals
from qcompile.proof.prepared import prepared

REACH = 6
NUMBERS = range(-REACH, REACH + 1)
GRID = np.array(list(itertools.product(NUMBERS, NUMBERS)), np.int32)
BOXES = np.array([pair for pair in itertools.product(NUMBERS, NUMBERS) if pair[0] <= pair[1]], np.int32)
INT32, BOOL, UINT32 = TensorProto.INT32, TensorProto.BOOL, TensorProto.UINT32

# operator: its attributes, the type of its operands, whether the rule gives the exact hull of what can come out
BINARY: dict[str, tuple[dict[str, Any], int, bool]] = {
    "Add": ({}, INT32, True), "Sub": ({}, INT32, True), "Mul": ({}, INT32, True), "Max": ({}, INT32, True),
    "Min": ({}, INT32, True), "Less": ({}, INT32, True), "LessOrEqual": ({}, INT32, True),
    "Greater": ({}, INT32, True), "GreaterOrEqual": ({}, INT32, True), "Equal": ({}, INT32, True),
    "And": ({}, BOOL, True), "Or": ({}, BOOL, True), "Xor": ({}, BOOL, False), "BitwiseAnd": ({}, INT32, False),
    "BitwiseOr": ({}, INT32, False), "BitwiseXor": ({}, INT32, False), "Div": ({}, INT32, True),
    "Mod": ({}, INT32, False), "Mod.c": ({"fmod": 1}, INT32, False),
    "BitShift": ({"direction": "LEFT"}, UINT32, True), "BitShift.right": ({"direction": "RIGHT"}, UINT32, True),
}  # fmt: skip
UNARY: dict[str, tuple[dict[str, Any], int]] = {
    "Neg": ({}, INT32), "Abs": ({}, INT32), "Sign": ({}, INT32), "Relu": ({}, INT32), "BitwiseNot": ({}, INT32),
    "Not": ({}, BOOL), "Identity": ({}, INT32), "Cast": ({"to": BOOL}, INT32),
    "Cast.wide": ({"to": TensorProto.INT64}, INT32),
}  # fmt: skip


def observed(
    node: tuple[str, dict[str, Any], int], boxes: list[np.ndarray], more: list[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The rule's ends and those of what ONNX Runtime computes, one a column; a column has a box of operands."""
    name, attributes, dtype = node
    nodes, constants, operands = [], [], []
    for place, box in enumerate(boxes):
        ends = [numpy_helper.from_array(np.ascontiguousarray(box[:, i]), f"e{place}{i}") for i in (0, 1)]
        constants += ends
        nodes.append(helper.make_node("Max", [f"x{place}", f"e{place}0"], [f"a{place}"]))
        nodes.append(helper.make_node("Min", [f"a{place}", f"e{place}1"], [f"b{place}"]))
        nodes.append(helper.make_node("Cast", [f"b{place}"], [f"d{place}"], to=dtype))
        operands.append(f"d{place}")
    for place, array in enumerate(more or []):
        constants.append(numpy_helper.from_array(array, f"m{place}"))
        operands.append(f"m{place}")
    nodes.append(helper.make_node(name, operands, ["y"], **attributes))
    ports = [helper.make_tensor_value_info(f"x{i}", INT32, [len(GRID), 1]) for i in range(len(boxes))]
    graph = helper.make_graph(nodes, "g", ports, [helper.make_empty_tensor_value_info("y")], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    ready = prepared(ir.from_proto(model), "test")
    found = find_intervals(ready.model, {})
    assert not found.findings, found.findings
    span = next(span for value, span in found.spans.items() if value.name == "y")
    feeds = {f"x{i}": GRID[:, i : i + 1] for i in range(len(boxes))}
    (y,) = open_session(model.SerializeToString(), threads=1).run(["y"], feeds)
    lo, hi = (np.broadcast_to(end, y.shape[1:]).astype(np.int64) for end in (span.lo, span.hi))
    exact = y.astype(np.int64)
    return lo, hi, exact.min(axis=0), exact.max(axis=0)


def boxes(count: int, low: int, high: int, seed: int, without: tuple[int, ...] = ()) -> np.ndarray:
    """Random boxes inside ``low..high``, those that hold a number of ``without`` left out."""
    held = [b for b in BOXES if b[0] >= low and b[1] <= high and not any(b[0] <= n <= b[1] for n in without)]
    return np.array(held)[np.random.default_rng(seed).integers(0, len(held), count)]


@pytest.mark.parametrize("name", BINARY)
def test_a_binary_operator(name: str) -> None:
    attributes, dtype, is_exact = BINARY[name]
    low = 0 if dtype in (UINT32, BOOL) else -REACH
    high = 1 if dtype == BOOL else REACH
    without = (0,) if name.startswith(("Div", "Mod")) else ()
    pair = [boxes(400, low, high, 0), boxes(400, low, high, 1, without)]
    lo, hi, least, most = observed((name.partition(".")[0], attributes, dtype), pair)
    assert (lo <= least).all() and (most <= hi).all()
    if is_exact:
        assert (lo == least).all() and (hi == most).all()


@pytest.mark.parametrize("name", UNARY)
def test_a_unary_operator(name: str) -> None:
    attributes, dtype = UNARY[name]
    box = boxes(200, 0 if dtype == BOOL else -REACH, 1 if dtype == BOOL else REACH, 2)
    lo, hi, least, most = observed((name.partition(".")[0], attributes, dtype), [box])
    assert (lo == least).all() and (hi == most).all()


@pytest.mark.parametrize("divisor", [n for n in NUMBERS if n])
@pytest.mark.parametrize("name", ["Div", "Mod", "Mod.c"])
def test_a_division_by_a_constant_is_exact(name: str, divisor: int) -> None:
    attributes = BINARY[name][0]
    more = [np.array(divisor, np.int32)]
    lo, hi, least, most = observed((name.partition(".")[0], attributes, INT32), [boxes(91, -REACH, REACH, 3)], more)
    assert (lo <= least).all() and (most <= hi).all()
    if name == "Div" or (name == "Mod" and divisor > 0):
        wrapped = (hi - lo == abs(divisor) - 1) if name == "Mod" else np.zeros(len(lo), bool)
        assert (((lo == least) & (hi == most)) | wrapped).all()


@pytest.mark.parametrize("power", range(5))
def test_a_power(power: int) -> None:
    lo, hi, least, most = observed(("Pow", {}, INT32), [boxes(91, -REACH, REACH, 4)], [np.array(power, np.int32)])
    assert (lo == least).all() and (hi == most).all()


@pytest.mark.parametrize(("low", "high"), [(-3, 2), (2, -3), (0, 0)])
def test_a_clip_whose_upper_end_wins(low: int, high: int) -> None:
    more = [np.array(low, np.int32), np.array(high, np.int32)]
    lo, hi, least, most = observed(("Clip", {}, INT32), [boxes(91, -REACH, REACH, 5)], more)
    assert (lo == least).all() and (hi == most).all()
