"""The float islands between integer kernels.

qcompile.RMSNormalization        ->  RMSNormalization (opset 23)
qcompile.Silu                    ->  com.microsoft.QuickGelu{alpha=1}: one pass instead of two
MatMul(x (T, K), W) + Add(bias)  ->  Gemm(x, W, bias)
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.backends.ort.emit import MS
from qcompile.backends.ort.linear import bias_of, replace_linear
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array
from qcompile.graph.functions import DOMAIN


def rewrite(model: ir.Model) -> int:
    """Replace the project's norms and activations and join biases; returns how many."""
    count = 0
    for node in match.nodes(model.graph, "RMSNormalization", "Silu"):
        if node.domain == DOMAIN:
            match.put_instead(node, _kernel(node))
            count += 1
    return count + sum(_gemm(node) for node in match.nodes(model.graph, "MatMul"))


def _kernel(node: ir.Node) -> ir.Node:
    if node.op_type == "Silu":
        return match.new_node(MS, "QuickGelu", node.inputs, {"a": ir.AttrFloat32("alpha", 1.0)}, [node])
    attributes = {"a": ir.AttrInt64("axis", -1), "e": node.attributes["epsilon"]}
    return match.new_node("", "RMSNormalization", node.inputs, attributes, [node])


def _gemm(product: ir.Node) -> int:
    x, weight = product.inputs[0], constant_array(product.inputs[1])
    if x is None or x.shape is None or len(x.shape) != 2 or weight is None or weight.ndim != 2:
        return 0
    add, bias = bias_of(product, weight.shape[1])
    if add is None:
        return 0
    replace_linear(product, add, ir.Node("", "Gemm", [x, product.inputs[1], bias], num_outputs=1))
    return 1
