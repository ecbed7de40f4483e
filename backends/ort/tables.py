"""Embedding tables stay codes: only the rows that are looked up become floats.

    Gather(DequantizeLinear(codes (V, C), scale (V), zero (V)), ids)
        ->  (Cast(Gather(codes, ids)) - Gather(zero, ids)) * Gather(scale, ids)
A tied head reads the same codes, perhaps with more columns, or as bytes around 128 in blocks (V, blocks, block)
(``grown``): the file holds one table.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.emit import put_node
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.provenance import layer_name
from qcompile.graph.workspace import Workspace
from qcompile.ledger import Ledger

PACKED_ZERO = 128


def rewrite(model: ir.Model, workspace: Workspace, ledger: Ledger, grown: dict[int, ir.Value]) -> int:
    """Look up codes instead of floats; ``grown``: by id of a table's codes, the table that took their place."""
    count = 0
    for gather in match.nodes(model.graph, "Gather"):
        dequantize = match.producer(gather.inputs[0], "DequantizeLinear")
        codes = dequantize.inputs[0] if dequantize is not None else None
        held = constant_array(codes)
        if dequantize is None or codes is None or held is None or held.ndim != 2:
            continue
        reason = _refusal(gather, dequantize)
        if reason:
            ledger.skip(layer_name(gather), reason, str(gather.name))
            continue
        _Lookup(model, workspace, gather, held.shape[1]).replace(dequantize, grown.get(id(codes), codes))
        count += 1
    return count


def _refusal(gather: ir.Node, dequantize: ir.Node) -> str:
    if match.int_attribute(gather, "axis", 0) != 0:
        return "the lookup takes columns of the table"
    if match.int_attribute(dequantize, "axis", 1) != 0 or match.int_attribute(dequantize, "block_size", 0):
        return "the table has no single scale for each row"
    return ""


class _Lookup:
    """Builds one lookup in front of the Gather that it replaces."""

    def __init__(self, model: ir.Model, workspace: Workspace, gather: ir.Node, width: int) -> None:
        self.model, self.workspace, self.gather, self.width = model, workspace, gather, width
        self.name = str(gather.outputs[0].name)

    def replace(self, dequantize: ir.Node, table: ir.Value) -> None:
        ids = self.gather.inputs[1]
        codes = self._codes(table, ids)
        real = self._put("Cast", [codes], "real", [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
        if table.dtype == ir.DataType.UINT8:
            middle = new_initializer(self.model, "middle", np.array(PACKED_ZERO, np.float32), self.workspace)
            real = self._put("Sub", [real, middle], "signed")
        zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
        array = constant_array(zero)
        if array is not None and array.any():
            held = new_initializer(self.model, f"{self.name}.zeros", array.astype(np.float32), self.workspace)
            real = self._put("Sub", [real, self._row(held, ids, "zero")], "centred")
        scale = self._row(dequantize.inputs[1], ids, "scale")
        match.put_instead(self.gather, match.new_node("", "Mul", [real, scale], {}, [self.gather]))

    def _codes(self, table: ir.Value, ids: ir.Value | None) -> ir.Value:
        codes, width = self._put("Gather", [table, ids], "codes"), 0
        rank = len(ids.shape) if ids is not None and ids.shape is not None else 2
        if table.shape is not None:
            width = int(np.prod(table.shape.numpy()[1:]))
        if table.shape is not None and len(table.shape) == 3:
            whole = new_initializer(self.model, "row", np.array([0] * rank + [width], np.int64), self.workspace)
            codes = self._put("Reshape", [codes, whole], "joined")
        if width != self.width:
            bounds = [
                new_initializer(self.model, hint, np.array([number], np.int64), self.workspace)
                for hint, number in (("start", 0), ("width", self.width), ("last", -1))
            ]
            codes = self._put("Slice", [codes, *bounds], "row_codes")
        return codes

    def _row(self, held: ir.Value | None, ids: ir.Value | None, label: str) -> ir.Value:
        """One number for each looked-up row, as a column."""
        last = new_initializer(self.model, "last", np.array([-1], np.int64), self.workspace)
        return self._put("Unsqueeze", [self._put("Gather", [held, ids], label), last], f"{label}_column")

    def _put(
        self, op: str, inputs: list[ir.Value | None], label: str, attributes: list[ir.Attr] | None = None
    ) -> ir.Value:
        return put_node(self.gather, "", op, inputs, f"{self.name}.{label}", attributes or []).outputs[0]
