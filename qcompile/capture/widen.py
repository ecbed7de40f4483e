"""float16 and bfloat16 models become float32 inside: passes start from float32, the caller's types stay."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qcompile.capture.tidy import to_identity
from qcompile.graph.provenance import inherit
from qcompile.graph.workspace import Workspace

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FACTORS = (math.sqrt(2), math.sqrt(0.5), math.sqrt(2 / math.pi), 0.044715)
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision")


def widen(model: ir.Model, workspace: Workspace) -> bool:
    """Make every half-precision tensor of ``model`` float32; True when there was one.

    rewrite:  weights and constants are converted one at a time; Cast and the like aim at float32;
              half-precision inputs are cast on entry and outputs on exit: the interface stays
    needs:    functions inlined and constants lifted to initializers
    """
    initializers = list(model.graph.initializers.values())
    values = [value for node in model.graph.all_nodes() for value in (*node.inputs, *node.outputs) if value]
    if not any(value.dtype in HALF for value in (*initializers, *values)):
        return False
    _cast_inputs(model.graph)
    _cast_outputs(model.graph)
    for value in initializers:
        _widen_initializer(value, workspace)
    for node in model.graph.all_nodes():
        _widen_node(node)
    for node in list(model.graph.all_nodes()):
        source = node.inputs[0] if node.op_type == "Cast" else None
        if source is not None and source.dtype == node.outputs[0].dtype == ir.DataType.FLOAT:
            to_identity(node)
    return True


def _widen_initializer(value: ir.Value, workspace: Workspace) -> None:
    held = value.const_value
    if held is None or held.dtype not in HALF:
        return
    value.const_value = workspace.tensor(_widened(held), value.name or "")
    value.dtype = ir.DataType.FLOAT
    if isinstance(held, ir.ExternalTensor):
        held.release()


def _widened(held: ir.TensorProtocol) -> np.ndarray:
    """float32; a factor of a GELU that was rounded with the weights is what it was meant to be."""
    narrow = held.numpy()
    if narrow.size == 1:
        for factor in _FACTORS:
            if narrow.reshape(-1)[0] == np.asarray(factor).astype(narrow.dtype):
                return np.full(narrow.shape, factor, np.float32)
    return narrow.astype(np.float32)


def _widen_node(node: ir.Node) -> None:
    if _is_interface_cast(node):
        return
    for value in node.outputs:
        if value.dtype in HALF:
            value.dtype = ir.DataType.FLOAT
    for name, attribute in list(node.attributes.items()):
        if name in _TYPE_ATTRIBUTES and attribute.value in [int(kind) for kind in HALF]:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALF:
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(_widened(attribute.as_tensor())))


def _is_interface_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.outputs[0].is_graph_output() and node.outputs[0].dtype in HALF


def _cast_inputs(graph: ir.Graph) -> None:
    for value in list(graph.inputs):
        if value.dtype not in HALF or not any(True for _ in value.uses()):
            continue
        users = list(value.uses())
        cast = _cast(value, ir.DataType.FLOAT, f"{value.name}_float32")
        for node, index in users:
            node.replace_input_with(index, cast.outputs[0])
        graph.insert_before(graph[0], cast)


def _cast_outputs(graph: ir.Graph) -> None:
    for index, value in enumerate(graph.outputs):
        producer = value.producer()
        if value.dtype not in HALF or producer is None:
            continue
        name, kind = value.name, value.dtype
        value.name = f"{name}_float32"
        cast = _cast(value, kind, name or "")
        inherit(cast, producer)
        graph.append(cast)
        graph.outputs[index] = cast.outputs[0]


def _cast(value: ir.Value, kind: ir.DataType, name: str) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": ir.AttrInt64("to", int(kind))}, name=f"Cast_{name}")
    made = cast.outputs[0]
    made.name, made.dtype = name, kind
    made.shape = None if value.shape is None else value.shape.copy()
    return cast
