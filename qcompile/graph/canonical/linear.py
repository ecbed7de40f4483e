"""Linear layers: MatMul(x, W) with W [K, N] constant, then Add(bias).

Gemm(x, W, b){transB}               ->  Add(MatMul(x, W'), b')
MatMul(x, Transpose(W))             ->  MatMul(x, W')       unless W is also an embedding table
Add(bias, MatMul)                   ->  Add(MatMul, bias)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, is_tied, new_initializer
from qcompile.graph.functions import is_op
from qcompile.graph.provenance import original_name
from qcompile.graph.workspace import Workspace

WEIGHTED = ("Conv", "ConvTranspose", "Einsum", "LSTM", "GRU", "RNN")


def rewrite(model: ir.Model, workspace: Workspace) -> int:
    """Bring every linear to one spelling; returns how many changed."""
    count = sum(_gemm(model, node, workspace) for node in match.nodes(model.graph, "Gemm"))
    count += sum(_transposed(model, node, workspace) for node in match.nodes(model.graph, "MatMul"))
    count += sum(_bias_last(node) for node in match.nodes(model.graph, "Add"))
    return count


def _gemm(model: ir.Model, node: ir.Node, workspace: Workspace) -> int:
    x, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    w = constant_array(weight)
    b = constant_array(bias) if bias is not None else None
    if x is None or weight is None or w is None or (bias is not None and b is None):
        return 0
    if match.int_attribute(node, "transA", 0) or (x.shape is not None and len(x.shape) != 2):
        return 0
    alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0
    beta = node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0
    if match.int_attribute(node, "transB", 0):
        w = w.T
    if b is not None and b.size != 1 and not b.size == b.shape[-1] == w.shape[1]:
        return 0
    weight = _renewed(model, weight, np.asarray(w * np.float32(alpha) if alpha != 1.0 else w), workspace)
    product = match.new_node("", "MatMul", [x, weight], {}, [node])
    if b is None:
        match.put_instead(node, product)
        return 1
    columns = np.broadcast_to((b * np.float32(beta)).reshape(-1), (w.shape[1],))
    _split_bias(node, product, _renewed(model, bias, columns, workspace))
    return 1


def _renewed(model: ir.Model, old: ir.Value | None, array: np.ndarray, workspace: Workspace) -> ir.Value:
    assert old is not None
    if old.is_initializer() and constant_array(old) is array:
        return old
    new = new_initializer(model, old.name or "weight", array, workspace)
    new.metadata_props.update(old.metadata_props)
    return new


def _split_bias(node: ir.Node, product: ir.Node, bias: ir.Value) -> None:
    graph, value = node.graph, node.outputs[0]
    assert graph is not None
    middle = product.outputs[0]
    middle.name, middle.type, middle.shape = f"{value.name}_product", value.type, value.shape
    graph.insert_before(node, product)
    match.put_instead(node, match.new_node("", "Add", [middle, bias], {}, [node]))


def _transposed(model: ir.Model, node: ir.Node, workspace: Workspace) -> int:
    transpose = match.producer(node.inputs[1], "Transpose")
    table = transpose.inputs[0] if transpose is not None else None
    w = constant_array(table)
    if transpose is None or table is None or w is None or w.ndim != 2 or is_tied(table):
        return 0
    node.replace_input_with(1, _renewed(model, table, w.T, workspace))
    match.remove_dead(model.graph, [transpose])
    return 1


def _bias_last(node: ir.Node) -> int:
    left, right = node.inputs[0], node.inputs[1]
    if (
        left is None
        or right is None
        or constant_array(left) is None
        or match.producer(right, "MatMul") is None
    ):
        return 0
    node.replace_input_with(0, right)
    node.replace_input_with(1, left)
    return 1


# --------------------------------------------------------------------------- what is almost a linear


def misses(graph: ir.Graph) -> list[match.Unrecognised]:
    """Products with a constant that are no linears, at the end of canonicalisation."""
    found = [(node, _gemm_detail(node)) for node in match.nodes(graph, "Gemm")]
    found += [(node, _product_detail(node)) for node in match.nodes(graph, "MatMul")]
    found += [(node, f"it stands inside of {outer}") for node, outer in _linears_inside(graph)]
    found += [(node, f"{node.op_type} has no kernel in low bits here") for node in _weighted(graph)]
    return [match.Unrecognised(node, f"not seen as a linear: {why}") for node, why in found if why]


def _weighted(graph: ir.Graph) -> Iterator[ir.Node]:
    """Operators other than products of matrices that hold a constant matrix."""
    for node in match.nodes(graph, *WEIGHTED):
        weights = [constant_array(value) for value in node.inputs]
        if any(weight is not None and weight.ndim > 1 and min(weight.shape[:2]) > 1 for weight in weights):
            yield node


def _linears_inside(graph: ir.Graph) -> Iterator[tuple[ir.Node, str]]:
    """Products with a constant matrix in the branches of If and the bodies of loops, and what those are in."""
    for outer in graph:
        bodies = [a.value for a in outer.attributes.values() if a.type == ir.AttributeType.GRAPH]
        for node in itertools.chain.from_iterable(map(ir.traversal.RecursiveGraphIterator, bodies)):
            weight = constant_array(node.inputs[1]) if is_op(node, "MatMul", "Gemm") else None
            if weight is not None and weight.ndim == 2 and min(weight.shape) > 1:
                yield node, f"{outer.op_type} '{original_name(outer)}'"


def _gemm_detail(node: ir.Node) -> str:
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if constant_array(weight) is None:
        return _computed(weight) or "its weight is computed at run time"
    if match.int_attribute(node, "transA", 0):
        return "its input is transposed (transA)"
    if bias is not None and constant_array(bias) is None:
        return "its bias is computed at run time"
    return "its bias is not one number for each column"


def _product_detail(node: ir.Node) -> str:
    left, right = (constant_array(value) for value in node.inputs[:2])
    if left is not None and right is None:
        return "its weight stands on the left" if left.ndim == 2 and min(left.shape) > 1 else ""
    if right is None:
        return _computed(node.inputs[1])
    if right.ndim != 2 and max(right.shape) > 1 and right.dtype == np.float32:
        return f"its weight has rank {right.ndim}"
    return "its weight is in float64, and float32 is needed" if right.dtype == np.float64 else ""


def _computed(weight: ir.Value | None) -> str:
    """Why a weight is not constant that does not depend on the model's inputs; empty when it does."""
    table = match.through(weight, "Transpose")
    node = match.producer(table)
    if node is None or constant_array(table) is not None or not _is_fixed(table):
        return ""
    return f"its weight is computed by {node.op_type} at run time"


def _is_fixed(value: ir.Value | None, depth: int = 8) -> bool:
    """Whether ``value`` follows from constants alone."""
    if value is None or constant_array(value) is not None:
        return True
    node = match.producer(value)
    return node is not None and depth > 0 and all(_is_fixed(v, depth - 1) for v in node.inputs)
