"""Write the nodes that take the place of one fused node, in front of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import new_initializer
from qcompile.graph.functions import DOMAIN, use
from qcompile.graph.provenance import inherit
from qcompile.graph.workspace import Workspace


class Draft:
    """The replacement of ``node``: every new node carries its provenance."""

    def __init__(self, model: ir.Model, node: ir.Node, workspace: Workspace) -> None:
        self.model, self.node, self.workspace = model, node, workspace
        self.base = node.outputs[0].name or node.name or node.op_type
        self._count = 0
        self._made: set[int] = set()

    def op(
        self, op_type: str, *inputs: ir.Value | None, **attributes: int | float | str | Sequence[int]
    ) -> ir.Value:
        """A node of the standard domain with one output."""
        return self.ops(op_type, inputs, 1, "", **attributes)[0]

    def own(self, op_type: str, *inputs: ir.Value | None, **attributes: int | float) -> ir.Value:
        """A function of the project's domain."""
        use(self.model, op_type)
        return self.ops(op_type, inputs, 1, DOMAIN, **attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        domain: str = "",
        **attributes: int | float | str | Sequence[int],
    ) -> list[ir.Value]:
        held = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
        node = ir.Node(domain, op_type, inputs, held, num_outputs=outputs)
        inherit(node, self.node)
        graph = self.node.graph
        assert graph is not None
        graph.insert_before(self.node, node)
        for value in node.outputs:
            value.name = f"{self.base}_{op_type.lower()}_{self._count}"
            self._count += 1
            self._made.add(id(value))
        return list(node.outputs)

    def constant(self, array: np.ndarray, role: str) -> ir.Value:
        return new_initializer(self.model, f"{self.base}_{role}", array, self.workspace)

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64), "ints")

    def number(self, value: float) -> ir.Value:
        return self.constant(np.asarray(value, np.float32), "number")

    def range(self, length: ir.Value) -> ir.Value:
        """0, 1, ... ``length`` - 1."""
        zero, one = (self.constant(np.asarray(n, np.int64), "count") for n in (0, 1))
        return self.op("Range", zero, length, one)

    def length(self, value: ir.Value, axis: int) -> ir.Value:
        """The size of one axis as a scalar."""
        return self.op("Squeeze", self.op("Shape", value, start=axis, end=axis + 1), self.ints(0))

    def finish(self, *results: ir.Value | None) -> str:
        """Let ``results`` stand for the node's outputs and remove it; returns "" (no reason to refuse)."""
        for old, new in zip(self.node.outputs, results, strict=False):
            if new is None:
                continue
            if id(new) not in self._made and old.is_graph_output():
                new = self.op("Identity", new)
            if new.type is None:
                new.type = old.type
            if new.shape is None:
                new.shape = old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            if id(new) in self._made:
                old.name, new.name = f"{old.name}_fused", old.name
        graph = self.node.graph
        assert graph is not None
        graph.remove(self.node, safe=True)
        return ""


def is_used(node: ir.Node, *indices: int) -> bool:
    """Whether any of these outputs of ``node`` is read."""
    outputs = [node.outputs[i] for i in indices if i < len(node.outputs)]
    return any(output.is_graph_output() or output.uses() for output in outputs)


def given(node: ir.Node, index: int) -> ir.Value | None:
    """Optional input ``index`` of ``node``."""
    return node.inputs[index] if index < len(node.inputs) else None


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return float(attribute.as_float()) if attribute is not None else default


def width_of(value: ir.Value | None) -> int | None:
    """The last axis of ``value``, by its shape or by the constant weight of the linear that makes it."""
    if value is None:
        return None
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    if isinstance(last, int):
        return last
    node = match.producer(value, "MatMul", "Add", "LayerNormalization", "RMSNormalization")
    for source in node.inputs[1:2] if node is not None else ():
        held = (
            source.shape[-1]
            if source is not None and source.shape is not None and len(source.shape)
            else None
        )
        if isinstance(held, int) and held > 1:
            return held
    return None
