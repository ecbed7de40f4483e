"""Embedding tables stay codes: only the rows that are looked up become floats.

    Gather(DequantizeLinear(codes (V, C), scale (V), zero (V)), ids)
        ->  (Cast(Gather(codes, ids)) - Gather(zero, ids)) * Gather(scale, ids)
A tied head reads the same codes, perhaps in another layout (``Stored``): the file holds one table.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.emit import node_before
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.provenance import layer_name
from qcompile.graph.workspace import Workspace
from qcompile.ledger import Ledger


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a table's codes are: the first C numbers of each row of ``held`` (V, ...), plus ``offset``."""

    held: ir.Value
    offset: int


def rewrite(model: ir.Model, workspace: Workspace, ledger: Ledger, stored: dict[int, Stored]) -> int:
    """Look up codes instead of floats; ``stored``: new layouts, by id of a table's codes."""
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
        _Lookup(model, workspace, gather, held.shape[1]).replace(
            dequantize, stored.get(id(codes), Stored(codes, 0))
        )
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

    def replace(self, dequantize: ir.Node, table: Stored) -> None:
        ids = self.gather.inputs[1]
        codes = self._codes(table, ids)
        real = self._put("Cast", [codes], "real", [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
        zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
        array = constant_array(zero)
        if array is not None and (array.any() or table.offset):
            shifted = array.astype(np.float32) + table.offset
            if (shifted == shifted[0]).all():
                shift = new_initializer(self.model, "offset", shifted[0], self.workspace)
            else:
                held = new_initializer(self.model, f"{self.name}.zeros", shifted, self.workspace)
                shift = self._row(held, ids, "zero")
            real = self._put("Sub", [real, shift], "centred")
        scale = self._row(dequantize.inputs[1], ids, "scale")
        match.put_instead(self.gather, match.new_node("", "Mul", [real, scale], {}, [self.gather]))

    def _codes(self, table: Stored, ids: ir.Value | None) -> ir.Value:
        codes = self._put("Gather", [table.held, ids], "codes")
        held = table.held.shape
        assert held is not None
        stride = int(np.prod(held.numpy()[1:]))
        if len(held) > 2:
            rank = len(ids.shape) if ids is not None and ids.shape is not None else 2
            flat = new_initializer(
                self.model, "flat", np.array([0] * rank + [stride], np.int64), self.workspace
            )
            codes = self._put("Reshape", [codes, flat], "flat_codes")
        if stride != self.width:
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
        return node_before(self.gather, "", op, inputs, f"{self.name}.{label}", attributes or []).outputs[0]
