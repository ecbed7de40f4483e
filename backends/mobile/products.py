"""What the matrix products of a program compute on, read from the graph that the kernels are written from."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.backends.base import Kernel
from qcompile.graph.canonical import match
from qcompile.graph.provenance import layer_name

_PRODUCTS = ("MatMul", "Gemm", "MatMulInteger")


def products(model: ir.Model) -> list[Kernel]:
    """One entry for each product, in graph order."""
    return [_described(node) for node in model.graph if node.op_type in _PRODUCTS]


def _described(node: ir.Node) -> Kernel:
    site = layer_name(node)
    if node.op_type == "MatMulInteger":
        return Kernel(site=site, kernel="integer product", low_bit=True, reason="")
    sides = [_is_quantised(value) for value in node.inputs[:2]]
    if all(sides):
        return Kernel(site=site, kernel="product of quantised sides", low_bit=True, reason="")
    if any(sides):
        return Kernel(site=site, kernel="product with low-bit weights", low_bit=True, reason="")
    return Kernel(site=site, kernel="float product", low_bit=False, reason="neither side is quantised")


def _is_quantised(value: ir.Value | None) -> bool:
    root = match.through(value, "Transpose", "Reshape")
    node = root.producer() if root is not None else None
    return node is not None and (node.op_type == "DequantizeLinear" or "quantize" in node.op_type.lower())
