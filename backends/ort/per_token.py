"""Linears whose activations take their range from each token at run time, on integer kernels.

    MatMul(qcompile.FakeQuantizePerToken(x (T, K)), W)  ->  s_t * MatMulIntegerToFloat(codes, W, 1, sw)
s_t is the step of row t; ``codes`` come from one QuantizeLinear with a scale for each row. The kernel knows
one zero point for all rows:
    symmetric, or fewer than 8 bits   codes - zero fits -127..127: stored around 128, the common zero point
    asymmetric, 8 bits                q = code + z_t fills 0..255, and
                                      (q - z_t) W = [q, z_t, ..., z_t] [W; r_1; ...; r_m],  sum r_i = -1^T W
                                      so m more columns, in int8 like the others, make it exact in int32
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.emit import put_node
from qcompile.backends.ort.linear import (
    QuantisedWeight,
    bias_of,
    column_zeros,
    integer_node,
    quantised_weight,
)
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, naming, new_initializer
from qcompile.graph.provenance import layer_name
from qcompile.graph.workspace import Workspace
from qcompile.ledger import Ledger

SCALE_FLOOR = np.float32(1.1754944e-38)  # as in the function
MIDDLE = np.uint8(128)
LANE = 4  # codes are multiplied four at a time


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A quantised x: codes u8 (T, K), step (T, 1), and for 8 asymmetric bits the zero points u8 (T, 1)."""

    codes: ir.Value
    step: ir.Value
    zero: ir.Value | None


def rewrite(model: ir.Model, workspace: Workspace, ledger: Ledger, tables: dict[int, ir.Value]) -> int:
    """Bring every per-token linear to its integer kernel; returns how many.

    Tied tables that had to grow are noted in ``tables``, by the id of their codes.
    """
    with naming(model):
        return _rewrite(model, ledger, _Lowering(model, workspace, tables))


def _rewrite(model: ir.Model, ledger: Ledger, lowering: _Lowering) -> int:
    count = 0
    for node in match.nodes(model.graph, "FakeQuantizePerToken", "FakeQuantizePerTokenSymmetric"):
        found = [(product, quantised_weight(product)) for product in match.consumers(node.outputs[0])]
        fitting = []
        for product, weight in found:
            reason = _refusal(node, product, weight)
            if reason:
                ledger.skip(layer_name(product), reason, str(product.name))
            elif weight is not None:
                fitting.append((product, weight))
        if fitting:
            count += lowering.replace(node, fitting)
    return count


def _refusal(node: ir.Node, product: ir.Node, weight: QuantisedWeight | None) -> str:
    if weight is None or product.inputs[0] is not node.outputs[0]:
        return "the weight is no quantised matrix"
    x = node.inputs[0]
    if x is None or x.shape is None or len(x.shape) != 2:
        return "the activation is no matrix of tokens"
    if not weight.per_column:
        return "weights have one scale for each group of rows; the int8 kernel takes one for each column"
    if not weight.is_symmetric and _has_row_zero(node):
        return "weights and 8-bit activations both have zero points; the kernel corrects one of them"
    return ""


def _has_row_zero(node: ir.Node) -> bool:
    return node.op_type == "FakeQuantizePerToken" and node.attributes["levels"].as_float() > 127


class _Lowering:
    """Writes the quantiser of each x once, and grows each weight once."""

    def __init__(self, model: ir.Model, workspace: Workspace, tables: dict[int, ir.Value]) -> None:
        self.model, self.workspace, self.tables = model, workspace, tables
        self.grown: dict[tuple[int, int], ir.Value] = {}

    def replace(self, node: ir.Node, linears: list[tuple[ir.Node, QuantisedWeight]]) -> int:
        rows = self._rows(node)
        if rows.zero is not None:
            extra = correction_count([weight for _, weight in linears])
            rows = self._widened(node, rows, extra)
        for product, weight in linears:
            matrix = weight.codes if rows.zero is None else self._grown(weight, extra)
            self._product(product, weight, matrix, rows)
        return len(linears)

    def _product(self, product: ir.Node, weight: QuantisedWeight, matrix: ir.Value, rows: _Rows) -> None:
        one = self._constant("one", np.float32(1))
        zero = self._constant("zero", np.uint8(0) if rows.zero is not None else MIDDLE)
        zeros = column_zeros(self.model, weight, self.workspace)
        made = integer_node([rows.codes, one, zero], weight, matrix, zeros)
        integer = match.new_node(made.domain, made.op_type, made.inputs, dict(made.attributes), [product])
        product.graph.insert_before(product, integer)  # type: ignore[union-attr]
        integer.outputs[0].name = f"{product.outputs[0].name}.unscaled"
        result = integer.outputs[0]
        result.dtype, result.shape = ir.DataType.FLOAT, product.outputs[0].shape
        add, bias = bias_of(product, weight.columns)
        scaled = match.new_node("", "Mul", [result, rows.step], {}, [product])
        match.put_instead(product, scaled)
        if add is not None:
            self._subtract(add, scaled.outputs[0], bias)

    def _subtract(self, add: ir.Node, value: ir.Value, bias: ir.Value | None) -> None:
        """y - (-b): ONNX Runtime fuses Add and Gelu into its BiasGelu, which is twice as slow as Gelu."""
        held = constant_array(bias)
        assert held is not None and bias is not None
        negative = self._constant(f"{bias.name}.negative", -held)
        match.put_instead(add, match.new_node("", "Sub", [value, negative], {}, [add]))

    # ----------------------------------------------------------------------- activations

    def _rows(self, node: ir.Node) -> _Rows:
        """Codes and steps of x, with the arithmetic of the function."""
        x = node.inputs[0]
        levels = self._constant("levels", np.float32(node.attributes["levels"].as_float()))
        floor = self._constant("floor", SCALE_FLOOR)
        last = self._constant("last", np.array([-1], np.int64))
        flat = [ir.AttrInt64("keepdims", 0)]
        top = self._put(node, "ReduceMax", [x, last], flat)
        bottom = self._put(node, "ReduceMin", [x, last], flat)
        low = None
        if node.op_type == "FakeQuantizePerTokenSymmetric":
            span = self._put(node, "Max", [top, self._put(node, "Neg", [bottom])])
        else:
            nought = self._constant("nought", np.float32(0))
            low = self._put(node, "Min", [bottom, nought])
            span = self._put(node, "Sub", [self._put(node, "Max", [top, nought]), low])
        scale = self._put(node, "Max", [self._put(node, "Div", [span, levels]), floor])
        column = self._constant("column", np.array([1], np.int64))
        step = self._put(node, "Unsqueeze", [scale, column])
        zero = self._zero(node, low, scale) if _has_row_zero(node) else self._middle(node, scale)
        codes = self._put(node, "QuantizeLinear", [x, scale, zero], [ir.AttrInt64("axis", 0)])
        row_zero = self._put(node, "Unsqueeze", [zero, column]) if _has_row_zero(node) else None
        return _Rows(codes, step, row_zero)

    def _zero(self, node: ir.Node, low: ir.Value | None, scale: ir.Value) -> ir.Value:
        """-round(low / scale) (T), as uint8."""
        first = self._put(node, "Round", [self._put(node, "Div", [low, scale])])
        to = [ir.AttrInt64("to", int(ir.DataType.UINT8))]
        return self._put(node, "Cast", [self._put(node, "Neg", [first])], to)

    def _middle(self, node: ir.Node, scale: ir.Value) -> ir.Value:
        shape = self._put(node, "Shape", [scale])
        return self._put(node, "Expand", [self._constant("middle", MIDDLE), shape])

    def _widened(self, node: ir.Node, rows: _Rows, extra: int) -> _Rows:
        """``rows`` with the zero point in ``extra`` more columns."""
        ones = self._constant("copies", np.array([1, extra], np.int64))
        copies = self._put(node, "Expand", [rows.zero, ones])
        codes = self._put(node, "Concat", [rows.codes, copies], [ir.AttrInt64("axis", 1)])
        return dataclasses.replace(rows, codes=codes)

    # ----------------------------------------------------------------------- weights

    def _grown(self, weight: QuantisedWeight, count: int) -> ir.Value:
        """The codes with the rows r_1 .. r_count appended."""
        key = (id(weight.codes), count)
        if key not in self.grown:
            held, axis = _held(weight), 1 if weight.transposed else 0
            rows = correction_rows(held.sum(axis=axis, dtype=np.int64), count)
            grown = np.concatenate([held, rows.T if weight.transposed else rows], axis=axis)
            self.grown[key] = self._constant(f"{weight.codes.name}.grown", grown)
            self.tables[id(weight.codes)] = self.grown[key]
        return self.grown[key]

    def _constant(self, name: str, array: np.ndarray | np.generic) -> ir.Value:
        return new_initializer(self.model, name, np.asarray(array), self.workspace)

    def _put(
        self, node: ir.Node, op: str, inputs: list[ir.Value | None], attributes: list[ir.Attr] | None = None
    ) -> ir.Value:
        made = put_node(node, "", op, inputs, f"{node.outputs[0].name}.{op}", attributes or [])
        return made.outputs[0]


def _held(weight: QuantisedWeight) -> np.ndarray:
    held = constant_array(weight.codes)
    assert held is not None
    return held


def correction_count(weights: Sequence[QuantisedWeight]) -> int:
    """m: enough int8 rows for the largest column sum, and such that K + m fills the lanes."""
    count = 1
    for weight in weights:
        sums = _held(weight).sum(axis=1 if weight.transposed else 0, dtype=np.int64)
        count = max(count, -(-int(np.abs(sums).max(initial=0)) // 127))
    return count + -(weights[0].rows + count) % LANE


def correction_rows(sums: np.ndarray, count: int) -> np.ndarray:
    """int8 rows (count, N) that add up to ``-sums`` (N)."""
    share, rest = np.divmod(-sums, count)
    rows: np.ndarray = share[None] + (np.arange(count)[:, None] < rest[None])
    return rows.astype(np.int8)
