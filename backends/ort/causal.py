"""Causal attention in chunks of queries: what lies right of the diagonal is mostly not computed.

    Attention(q, k, v, bias)  ->  Concat over chunks a:b of Attention(q[a:b], k[:b], v[:b], bias[a:b, :b])
needs:    a bias that masks every column behind its row: its condition compares two views of the same Range
why:      the kernel computes what a mask hides too, and slowly: its exp ends at exp(-88.4), a denormal
ensures:  the same function for every length: chunks of a short sequence overlap and are cut at the end
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.emit import put_node
from qcompile.graph.canonical import match
from qcompile.graph.edits import new_initializer
from qcompile.graph.workspace import Workspace

CHUNKS = 8
HIDDEN = -1e3  # a bias below this masks
_VIEWS = ("Unsqueeze", "Squeeze", "Cast", "Identity", "Reshape")


def is_causal(bias: ir.Value) -> bool:
    """Whether ``bias`` (.., S, S) masks every column behind its row, by its structure."""
    node = match.producer(bias, "Where", "Add", "Expand", "Identity")
    if node is None:
        return False
    if node.op_type == "Add":
        return any(v is not None and is_causal(v) for v in node.inputs)
    if node.op_type == "Where":
        masked = match.scalar(node.inputs[2])
        return masked is not None and masked < HIDDEN and _implies_order(node.inputs[0])
    return node.inputs[0] is not None and is_causal(node.inputs[0])


def _implies_order(condition: ir.Value | None) -> bool:
    """Whether ``condition`` holds only where column <= row."""
    node = match.producer(condition, "And", "LessOrEqual", "GreaterOrEqual", "Cast", "Expand", "Identity")
    if node is None:
        return False
    if node.op_type == "And":
        return any(_implies_order(v) for v in node.inputs)
    if node.op_type in ("LessOrEqual", "GreaterOrEqual"):
        column, row = node.inputs if node.op_type == "LessOrEqual" else reversed(node.inputs)
        return _is_axis(column, -2) and _is_axis(row, -1) and _range(column) is _range(row) is not None
    return _implies_order(node.inputs[0])


def _is_axis(value: ir.Value | None, other: int) -> bool:
    """Whether ``value`` varies along the last two axes only, and not along ``other``."""
    shape = value.shape if value is not None else None
    return shape is not None and len(shape) >= 2 and shape[other] == 1 and all(d == 1 for d in list(shape)[:-2])


def _range(value: ir.Value | None) -> ir.Value | None:
    """The ascending Range that ``value`` is a view of."""
    source = match.through(value, *_VIEWS)
    node = match.producer(source, "Range")
    step = match.scalar(node.inputs[2]) if node is not None else None
    return source if step is not None and step > 0 else None


class Chunks:
    """Cuts attentions; bounds and pieces of the bias are made once for each bias."""

    def __init__(self, model: ir.Model, workspace: Workspace) -> None:
        self.model, self.workspace = model, workspace
        self.pieces: dict[int, list[tuple[ir.Value, ir.Value, ir.Value]]] = {}

    def attention(self, inputs: list[ir.Value], attributes: list[ir.Attr], reader: ir.Node, name: str) -> ir.Node:
        """The node that gives Attention(*inputs){attributes}, computed in chunks before ``reader``."""
        q, k, v, bias = inputs
        if id(bias) not in self.pieces:
            self.pieces[id(bias)] = self._cut(bias, reader)
        outputs, first, rows = [], self._constant([0]), self._constant([1])
        for start, end, piece in self.pieces[id(bias)]:
            parts = [self._put(reader, "Slice", [q, start, end, rows], f"{name}.q")]
            parts += [self._put(reader, "Slice", [x, first, end, rows], f"{name}.kv") for x in (k, v)]
            outputs.append(self._put(reader, "Attention", [*parts, piece], f"{name}.chunk", attributes))
        joined = self._put(reader, "Concat", outputs, f"{name}.chunks", [ir.AttrInt64("axis", 1)])
        end = self.pieces[id(bias)][-1][1]
        return put_node(reader, "", "Slice", [joined, first, end, rows], name)

    def _cut(self, bias: ir.Value, reader: ir.Node) -> list[tuple[ir.Value, ir.Value, ir.Value]]:
        """(start, end, bias[start:end, :end]) of each chunk, none of them empty.

        Chunk j covers rows min(j c / n, S - 1) .. min((j + 1) c / n, S) with c = max(S, n).
        """
        name = str(bias.name)

        def put(op: str, inputs: list[ir.Value], **numbers: int) -> ir.Value:
            attributes = [ir.AttrInt64(key, number) for key, number in numbers.items()]
            return self._put(reader, op, inputs, f"{name}.{op}", attributes)

        size = put("Shape", [bias], start=-2, end=-1)
        most, none = self._constant([CHUNKS]), self._constant([0])
        cover, last = put("Max", [size, most]), put("Sub", [size, self._constant([1])])
        inner = [put("Div", [put("Mul", [cover, self._constant([j])]), most]) for j in range(1, CHUNKS)]
        starts = [none, *(put("Min", [bound, last]) for bound in inner)]
        ends = [*(put("Min", [bound, size]) for bound in inner), size]
        axes = self._constant([-2, -1])
        return [
            (
                a,
                b,
                put("Slice", [bias, put("Concat", [a, none], axis=0), put("Concat", [b, b], axis=0), axes]),
            )
            for a, b in zip(starts, ends, strict=True)
        ]

    def _put(
        self,
        reader: ir.Node,
        op: str,
        inputs: list[ir.Value],
        name: str,
        attributes: list[ir.Attr] | None = None,
    ) -> ir.Value:
        value = put_node(reader, "", op, inputs, name, attributes or []).outputs[0]
        return value

    def _constant(self, numbers: list[int]) -> ir.Value:
        return new_initializer(self.model, "chunk", np.array(numbers, np.int64), self.workspace)
