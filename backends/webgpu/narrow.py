"""64-bit integers as 32-bit ones: WGSL has no others.

rewrite:  int64 inputs, outputs, constants and casts  ->  int32
needs:    numbers that say where something is: token ids, positions, dims; no products of 64 bits
ensures:  the same results for every index below 2^31; large bounds of slices become the largest int32
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.errors import UserError
from qcompile.graph.provenance import layer_name

_LIMITS = np.iinfo(np.int32)
_PRODUCTS = ("Mul", "Div", "MatMul", "Pow", "BitShift")


def narrow(model: ir.Model) -> None:
    """Narrow ``model`` in place; UserError for the first operator that computes with 64 bits."""
    wide = {function.name for function in model.functions.values() if any(map(_widens, function))}
    for node in model.graph:
        if node.op_type in wide or (node.op_type in _PRODUCTS and any(map(_is_wide, node.outputs))):
            what = f"{layer_name(node)}: {node.op_type} takes products of 64-bit integers, which WGSL does not have"
            raise UserError(what, hint="leave int_only out, or take --target opencl or metal")
    for value in model.graph.initializers.values():
        if _is_wide(value) and value.const_value is not None:
            value.const_value = _narrow(value.const_value)
        _retype(value)
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for value in graph.inputs:
            _retype(value)
        for node in graph:
            _node(node)


def _widens(node: ir.Node) -> bool:
    to = node.attributes.get("to")
    return node.op_type == "Cast" and to is not None and to.value == ir.DataType.INT64


def _is_wide(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.INT64


def _node(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.INT64:
            node.attributes[name] = ir.AttrTensor(name, _narrow(attribute.value))
        elif name == "to" and attribute.value == ir.DataType.INT64:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.INT32))
    for value in node.outputs:
        _retype(value)


def _retype(value: ir.Value) -> None:
    if _is_wide(value):
        value.type = ir.TensorType(ir.DataType.INT32)  # a clone has the very type of its original


def _narrow(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    held = np.clip(tensor.numpy(), _LIMITS.min, _LIMITS.max).astype(np.int32)
    return ir.Tensor(held, name=tensor.name)
