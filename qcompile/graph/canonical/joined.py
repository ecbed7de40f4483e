"""Batch and heads are two axes: a Reshape that joins them moves down until another parts them again.

    Reshape(f(Reshape(x (B, H, S, d), [B H, S, d])), [B, H, S, T])  ->  f(x)

BLOOM and older exports write attention with ``bmm`` on (B H, S, d); the recogniser wants four axes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.canonical.flatten import undo
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.functions import is_op
from qcompile.graph.trace import same_shape
from qcompile.graph.workspace import Workspace


def rewrite(model: ir.Model, workspace: Workspace) -> int:
    """Part every joined attention; returns how many reshapes were undone."""
    for node in match.nodes(model.graph, "MatMul", "Transpose", "Add", "Mul", "Div", "Softmax"):
        _part(model, node, workspace)
    return sum(undo(model, node, _joined(node.inputs[0])) for node in match.nodes(model.graph, "Reshape"))


def _joined(value: ir.Value | None) -> ir.Value | None:
    """x (B, H, S, d) when ``value`` is x as (B H, S, d)."""
    node = match.producer(value, "Reshape")
    x = node.inputs[0] if node is not None else None
    if value is None or x is None or x.shape is None or value.shape is None:
        return None
    ranks = (len(x.shape), len(value.shape)) == (4, 3)
    return x if ranks and isinstance(x.shape[1], int) and same_shape(x.shape[2:], value.shape[1:]) else None


def _part(model: ir.Model, node: ir.Node, workspace: Workspace) -> None:
    """Let ``node`` work on four axes when what it reads was joined, and join its result."""
    parted = [_joined(value) for value in node.inputs]
    if node.outputs[0].is_graph_output() or node.outputs[0].shape is None or not any(parted):
        return
    if is_op(node, "MatMul"):
        inputs = parted if all(parted) else None
    elif is_op(node, "Transpose"):
        straight = (
            list(node.attributes["perm"].as_ints()) == [0, 2, 1] if "perm" in node.attributes else False
        )
        inputs = parted if straight else None
        if straight:
            node.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 3, 2])
    elif is_op(node, "Softmax"):
        inputs = parted if match.int_attribute(node, "axis", -1) in (-1, 2) else None
        if inputs is not None:
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
    else:
        inputs = _parted_pair(model, node, parted, workspace)
    if inputs is not None:
        _exchange(model, node, inputs, workspace)


def _parted_pair(
    model: ir.Model, node: ir.Node, parted: list[ir.Value | None], workspace: Workspace
) -> list[ir.Value | None] | None:
    """The operands of an elementwise operator with four axes each; numbers stay."""
    results: list[ir.Value | None] = []
    for value, whole in zip(node.inputs, parted, strict=True):
        if whole is None and constant_array(value) is not None and match.scalar(value) is not None:
            whole = value
        results.append(whole if whole is not None else _unsqueezed(model, node, value, workspace))
    return results if all(v is not None for v in results) else None


def _unsqueezed(
    model: ir.Model, node: ir.Node, value: ir.Value | None, workspace: Workspace
) -> ir.Value | None:
    """(B, H, 1, T) for a bias that was made of (B, H, T) as (B H, 1, T)."""
    made = match.producer(value, "Reshape")
    x = made.inputs[0] if made is not None else None
    if value is None or x is None or x.shape is None or value.shape is None or len(x.shape) != 3:
        return None
    if len(value.shape) != 3 or value.shape[1] != 1 or not same_shape(x.shape[2:], value.shape[2:]):
        return None
    axis = new_initializer(model, f"{value.name}_axis", np.array([2], np.int64), workspace)
    unsqueeze = match.new_node("", "Unsqueeze", [x, axis], {}, [node])
    assert node.graph is not None
    node.graph.insert_before(node, unsqueeze)
    result = unsqueeze.outputs[0]
    result.name, result.type = f"{node.outputs[0].name}_parted", value.type
    result.shape = ir.Shape([x.shape[0], x.shape[1], 1, x.shape[2]])
    return result


def _exchange(model: ir.Model, node: ir.Node, inputs: list[ir.Value | None], workspace: Workspace) -> None:
    old, joins = node.outputs[0], [n for v in node.inputs if (n := match.producer(v, "Reshape")) is not None]
    assert old.shape is not None and node.graph is not None
    lead = next(v.shape for v in inputs if v is not None and v.shape is not None and len(v.shape) == 4)
    assert lead is not None
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    flat = ir.Value(name=f"{old.name}_joined", type=old.type, shape=old.shape)
    old.replace_all_uses_with(flat)
    target = _joined_shape(model, node, old, workspace)
    join = match.new_node("", "Reshape", [old, target], {}, [node])
    flat.replace_all_uses_with(join.outputs[0])
    flat = join.outputs[0]
    node.graph.insert_after(target.producer() or node, join)
    flat.name, flat.type, flat.shape = f"{old.name}_joined", old.type, old.shape
    old.shape = ir.Shape([lead[0], lead[1], *old.shape[1:]])
    match.remove_dead(model.graph, joins)


def _joined_shape(model: ir.Model, node: ir.Node, value: ir.Value, workspace: Workspace) -> ir.Value:
    """[-1, S, T] at run time, out of the shape of ``value`` with four axes."""
    graph = node.graph
    assert graph is not None
    free = new_initializer(model, f"{value.name}_free", np.array([-1], np.int64), workspace)
    start = {"start": ir.AttrInt64("start", 2), "end": ir.AttrInt64("end", 4)}
    shape = match.new_node("", "Shape", [value], start, [node])
    whole = match.new_node("", "Concat", [free, shape.outputs[0]], {"axis": ir.AttrInt64("axis", 0)}, [node])
    graph.insert_after(node, [shape, whole])
    shape.outputs[0].name, whole.outputs[0].name = f"{value.name}_sizes", f"{value.name}_joined_shape"
    return whole.outputs[0]
