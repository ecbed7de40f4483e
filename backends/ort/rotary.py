"""Rotary embedding on token tensors.

    qcompile.RotaryEmbedding(x (B, H, S, d), cos, sin)
        ->  com.microsoft.RotaryEmbedding(x (B, S, H * d), positions (B, S), cos (R, d/2), sin (R, d/2))
The rows R of the tables are S (one table for all samples) or B * S; ``positions`` numbers them. The
kernel reads half a row: both halves of cos, and of sin, must be the same numbers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.emit import MS, put_node
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.workspace import Workspace


class Rotary:
    """Makes each table and its positions once."""

    def __init__(self, model: ir.Model, workspace: Workspace) -> None:
        self.model, self.workspace = model, workspace
        self.tables: dict[int, ir.Value] = {}
        self.positions: dict[tuple[int, str], ir.Value] = {}

    def fits(self, rope: ir.Node) -> bool:
        """Whether x, cos and sin of ``rope`` have the form above."""
        x, cos, sin = rope.inputs
        shape = x.shape if x is not None else None
        if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
            return False
        return all(t is not None and _one_head(t, shape[3]) and _halves_equal(t) for t in (cos, sin))

    def replace(self, rope: ir.Node, source: ir.Value) -> ir.Value:
        """The rotated ``source`` (B, S, H * d)."""
        x, cos, sin = rope.inputs
        assert x is not None and cos is not None and sin is not None and x.shape is not None
        width = x.shape[3]
        assert isinstance(width, int)
        halves = [self._half(table, width, rope) for table in (cos, sin)]
        inputs = [source, self._positions(halves[0], source, rope), *halves]
        attributes = [ir.AttrInt64("num_heads", int(x.shape[1])), ir.AttrInt64("interleaved", 0)]  # type: ignore[arg-type]
        new = put_node(rope, MS, "RotaryEmbedding", inputs, f"{rope.outputs[0].name}.by_token", attributes)
        result = new.outputs[0]
        result.type, result.shape = source.type, source.shape
        return result

    def _half(self, table: ir.Value, width: int, reader: ir.Node) -> ir.Value:
        if id(table) not in self.tables:
            start, end, axis = (self._constant(n, [v]) for n, v in (("start", 0), ("half", width // 2), ("last", -1)))
            half = put_node(reader, "", "Slice", [table, start, end, axis], f"{table.name}.half").outputs[0]
            rows = self._constant("table_rows", [-1, width // 2])
            self.tables[id(table)] = put_node(reader, "", "Reshape", [half, rows], f"{table.name}.table").outputs[0]
            self.tables[id(table)].dtype = ir.DataType.FLOAT
        return self.tables[id(table)]

    def _positions(self, table: ir.Value, source: ir.Value, reader: ir.Node) -> ir.Value:
        """Row numbers of ``table`` as (B, S): 0, 1, 2 ... in rows of S, a single row repeated."""
        key = (id(table), str(list(source.shape or [])[:2]))
        if key not in self.positions:
            name = f"{table.name}.positions"

            def put(op: str, inputs: list[ir.Value], **numbers: int) -> ir.Value:
                attributes = [ir.AttrInt64(k, v) for k, v in numbers.items()]
                return put_node(reader, "", op, inputs, f"{name}.{op}", attributes).outputs[0]

            zero, one = (self._scalar(n, v) for n, v in (("zero", 0), ("one", 1)))
            count = put("Squeeze", [put("Shape", [table], start=0, end=1)])
            leading, length = put("Shape", [source], start=0, end=2), put("Shape", [source], start=1, end=2)
            numbers = put("Range", [zero, count, one])
            by_row = put("Reshape", [numbers, put("Concat", [self._constant("any", [-1]), length], axis=0)])
            self.positions[key] = put("Expand", [by_row, leading])
        return self.positions[key]

    def _constant(self, name: str, numbers: list[int]) -> ir.Value:
        return new_initializer(self.model, name, np.array(numbers, np.int64), self.workspace)

    def _scalar(self, name: str, number: int) -> ir.Value:
        return new_initializer(self.model, name, np.array(number, np.int64), self.workspace)


def _one_head(table: ir.Value, width: int) -> bool:
    """Whether ``table`` is (..., S, d), the same for all heads."""
    shape = table.shape
    if shape is None or len(shape) < 2 or shape[-1] != width:
        return False
    return len(shape) < 3 or shape[-3] == 1


def _halves_equal(table: ir.Value) -> bool:
    value: ir.Value | None = table
    while (
        node := match.producer(value, "Unsqueeze", "Cos", "Sin", "Cast", "Mul", "Reshape", "Gather", "Slice")
    ) is not None:
        if node.op_type == "Mul":
            operands = match.constant_operand(node)
            if operands is None or operands[1].size != 1:
                return False
            value = operands[0]
        elif node.op_type in ("Reshape", "Slice", "Gather") and not _keeps_last(node):
            return False
        else:
            value = node.inputs[0]
    held = constant_array(value)
    if held is not None:
        half = held.shape[-1] // 2
        return bool(np.array_equal(held[..., :half], held[..., half:]))
    concat = match.producer(value, "Concat")
    rank = len(concat.outputs[0].shape) if concat is not None and concat.outputs[0].shape is not None else 0
    if concat is None or len(concat.inputs) != 2 or concat.inputs[0] is not concat.inputs[1]:
        return False
    return match.int_attribute(concat, "axis", -1) in (-1, rank - 1)


def _keeps_last(node: ir.Node) -> bool:
    before, after = node.inputs[0], node.outputs[0]
    if before is None or before.shape is None or after.shape is None or not len(before.shape) or not len(after.shape):
        return False
    return isinstance(before.shape[-1], int) and before.shape[-1] == after.shape[-1]
