"""Floats in 16 bits, but for what leaves their range: quantisers, sums of codes, positions.

rewrite:  float32 values and constants -> float16; a Cast wherever both meet
needs:    the last step of a lowering: nodes that must stay wide have names that end in ``WIDE``
ensures:  inputs and outputs stay float32; constants beyond float16 are its largest number
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.workspace import Workspace

WIDE = ".wide"
IN_FLOAT32 = ("QuantizeLinear", "DequantizeLinear", "Range", "CumSum", "Cos", "Sin")
MOST = float(np.finfo(np.float16).max)
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def rewrite(model: ir.Model, workspace: Workspace) -> int:
    """Make ``model`` one of float16; the number of casts that it takes."""
    common.ShapeInferencePass()(model)
    return _Halver(model, workspace).run()


class _Halver:
    """``casts``: a value in another type, by its id and that type."""

    def __init__(self, model: ir.Model, workspace: Workspace) -> None:
        self._model, self._workspace = model, workspace
        self._casts: dict[tuple[int, ir.DataType], ir.Value] = {}
        self._count = 0

    def run(self) -> int:
        ends = {id(value) for value in self._model.graph.outputs}
        for node in list(self._model.graph):
            self._know(node)
            wide = node.op_type in IN_FLOAT32 or str(node.name).endswith(WIDE)
            for place, value in enumerate(node.inputs):
                if value is not None and value.dtype in (FLOAT, HALF):
                    node.replace_input_with(place, self._as(value, FLOAT if wide else HALF, node))
            if not wide:
                self._narrow(node, ends)
        common.RemoveUnusedNodesPass()(self._model)
        return self._count

    def _know(self, node: ir.Node) -> None:
        """Types that shape inference does not find: those of other domains' operators."""
        first = node.inputs[1 if node.op_type == "Where" else 0] if node.inputs else None
        for output in node.outputs:
            if output.dtype is None and first is not None and first.dtype is not None:
                output.dtype = FLOAT if first.dtype == HALF else first.dtype

    def _as(self, value: ir.Value, kind: ir.DataType, reader: ir.Node) -> ir.Value:
        if value.dtype == kind:
            return value
        key = id(value), kind
        if key not in self._casts:
            held = constant_array(value) if value.is_initializer() else None
            if held is not None:
                short = np.clip(held, -MOST, MOST).astype(np.float16)
                self._casts[key] = new_initializer(self._model, f"{value.name}.half", short, self._workspace)
            else:
                self._casts[key] = self._cast(value, kind, reader)
        return self._casts[key]

    def _cast(self, value: ir.Value, kind: ir.DataType, reader: ir.Node) -> ir.Value:
        made = match.new_node("", "Cast", [value], {"to": ir.AttrInt64("to", kind.value)}, [reader])
        made.name = made.outputs[0].name = f"{value.name}.{kind.name.lower()}"
        made.outputs[0].dtype, made.outputs[0].shape = kind, value.shape
        reader.graph.insert_before(reader, made)  # type: ignore[union-attr]
        self._count += 1
        return made.outputs[0]

    def _narrow(self, node: ir.Node, ends: set[int]) -> None:
        """The float outputs of ``node`` as float16; those of the graph are cast back under their names."""
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT.value:
            node.attributes["to"] = ir.AttrInt64("to", HALF.value)
        for name in ("value", "value_float", "value_floats"):
            self._constant(node, name)
        for output in node.outputs:
            if output.dtype != FLOAT:
                continue
            if id(output) not in ends:
                output.dtype = HALF
                continue
            inner = ir.Value(name=f"{output.name}.half", shape=output.shape, type=ir.TensorType(HALF))
            self._reproduce(node, output, inner)

    def _constant(self, node: ir.Node, name: str) -> None:
        attribute = node.attributes.get(name)
        if node.op_type not in ("Constant", "ConstantOfShape") or attribute is None:
            return
        held = attribute.as_tensor().numpy() if name == "value" else np.asarray(attribute.value, np.float32)
        if held.dtype == np.float32:
            del node.attributes[name]
            short = np.clip(held, -MOST, MOST).astype(np.float16)
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(short))

    def _reproduce(self, node: ir.Node, output: ir.Value, inner: ir.Value) -> None:
        """``inner`` as what ``node`` makes, and ``output`` cast from it."""
        made = ir.Node(
            node.domain, node.op_type, node.inputs, list(node.attributes.values()),
            outputs=[inner if one is output else ir.Value(name=one.name, shape=one.shape, type=one.type)
                     for one in node.outputs], name=node.name, metadata_props=dict(node.metadata_props),
        )  # fmt: skip
        back = match.new_node("", "Cast", [inner], {"to": ir.AttrInt64("to", FLOAT.value)}, [node])
        back.name = f"{output.name}.float"
        node.graph.insert_before(node, [made, back])  # type: ignore[union-attr]
        self._count += 1
        ends = [back.outputs[0] if one is inner else one for one in made.outputs]
        for old, new in zip(node.outputs, ends, strict=True):
            new.type, new.shape = old.type, old.shape
            name = old.name
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            old.name, new.name = None, name
        node.graph.remove(node, safe=True)  # type: ignore[union-attr]
