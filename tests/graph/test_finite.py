"""A weight that is not finite is found and named; a mask's minus infinity is not one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompile.graph import finite
from qcompile.graph.finite import bad_weight


def reading(array: np.ndarray, *operators: str) -> ir.Model:
    """x -> the last operator, whose second input is ``array`` through the operators before it."""
    x, weight = ir.val("x", ir.DataType.FLOAT, ["n", "k"]), ir.val("fc.weight", const_value=ir.tensor(array))
    nodes, held = [], weight
    for operator in operators[:-1]:
        nodes.append(ir.node(operator, [held]))
        held = nodes[-1].outputs[0]
    nodes.append(ir.node(operators[-1], [x, held]))
    graph = ir.Graph([x], nodes[-1].outputs, nodes=nodes, initializers=[weight], opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def holding(number: float, dtype: type = np.float32) -> np.ndarray:
    array: np.ndarray = np.ones((4, 6), dtype)
    array[2, 3] = number
    return array


@pytest.mark.parametrize(
    ("number", "operators"),
    [
        (np.inf, ["MatMul"]),
        (-np.inf, ["MatMul"]),
        (-np.inf, ["Transpose", "MatMul"]),
        (np.inf, ["Add"]),
        (np.inf, ["Gather"]),
        (np.nan, ["Where"]),
    ],
)
def test_a_weight_that_is_not_finite_is_named(number: float, operators: list[str]) -> None:
    assert bad_weight(reading(holding(number), *operators)) == f"'fc.weight' holds {number} at [2, 3]"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_width_is_looked_at(dtype: type) -> None:
    assert "holds inf at [2, 3]" in bad_weight(reading(holding(np.inf, dtype), "MatMul"))


@pytest.mark.parametrize("operators", [["Add"], ["Where"], ["Unsqueeze", "Add"], ["Gather"]])
def test_a_mask_is_no_weight(operators: list[str]) -> None:
    assert bad_weight(reading(holding(-np.inf), *operators)) == ""


def test_a_large_weight_is_searched_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_BLOCK", 5)
    assert "at [2, 3]" in bad_weight(reading(holding(np.nan), "MatMul"))
    assert bad_weight(reading(holding(2.0), "MatMul")) == ""
