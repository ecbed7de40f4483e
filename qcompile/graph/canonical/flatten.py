"""Rows stay in their batch: a Reshape to a matrix moves down past what works on rows, and is undone.

    Reshape(f(Reshape(x, [-1, C])), [B, S, N])  ->  f(x)         f: linears, norms, activations, sums

Exporters write GPT-2's Conv1D and OPT's feed-forward part so; every later pass then sees (B, S, C).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.functions import is_op
from qcompile.graph.trace import same_shape
from qcompile.graph.workspace import Workspace

_ON_ROWS = ("LayerNormalization", "RMSNormalization", "Relu", "Gelu", "Silu", "Tanh", "Sigmoid")
_OF_TWO = ("Add", "Mul", "Sub")


def rewrite(model: ir.Model, workspace: Workspace) -> int:
    """Remove every pair of reshapes around operators on rows; returns how many were undone."""
    for reshape in list(match.nodes(model.graph, "Reshape")):
        _merge_heads_first(model, reshape, workspace)
        _sink(model, reshape, workspace)
    return sum(undo(model, node, _flattened(node.inputs[0])) for node in match.nodes(model.graph, "Reshape"))


def _merge_heads_first(model: ir.Model, reshape: ir.Node, workspace: Workspace) -> None:
    """Reshape(x (B, S, H, d), [-1, H d])  ->  Reshape(Reshape(x, [0, 0, H d]), [-1, H d])."""
    x, value = reshape.inputs[0], reshape.outputs[0]
    if x is None or x.shape is None or value.shape is None or len(x.shape) != 4 or len(value.shape) != 2:
        return
    heads, within, width = x.shape[2], x.shape[3], value.shape[1]
    if not (isinstance(heads, int) and isinstance(within, int) and width == heads * within):
        return
    target = new_initializer(model, f"{value.name}_merge", np.array([0, 0, width], np.int64), workspace)
    merge = match.new_node("", "Reshape", [x, target], {}, [reshape])
    assert reshape.graph is not None
    reshape.graph.insert_before(reshape, merge)
    merged = merge.outputs[0]
    merged.name, merged.type = f"{value.name}_merged", value.type
    merged.shape = ir.Shape([x.shape[0], x.shape[1], width])
    reshape.replace_input_with(0, merged)


def _flattened(value: ir.Value | None) -> ir.Value | None:
    """x (B, S, C) when ``value`` is x as a matrix (B S, C)."""
    node = match.producer(value, "Reshape")
    x = node.inputs[0] if node is not None else None
    if value is None or x is None or x.shape is None or value.shape is None:
        return None
    whole = len(x.shape) == 3 and len(value.shape) == 2
    return x if whole and x.shape[-1] == value.shape[-1] and isinstance(x.shape[-1], int) else None


def _sink(model: ir.Model, reshape: ir.Node, workspace: Workspace) -> None:
    """Move one reshape below its readers as far as they work on rows."""
    pending = [reshape]
    while pending:
        node = pending.pop()
        value = node.outputs[0]
        if node.graph is None or _flattened(value) is None:
            continue
        for reader in {id(n): n for n in match.consumers(value)}.values():
            lifted = _lifted_inputs(reader)
            if lifted is not None:
                pending.append(_exchange(model, reader, lifted, workspace))
        match.remove_dead(model.graph, [node])


def _lifted_inputs(node: ir.Node) -> list[ir.Value | None] | None:
    """The inputs for ``node`` to work on (B, S, C) instead; None when it does not work on rows."""
    inputs: list[ir.Value | None] = list(node.inputs)
    shape = node.outputs[0].shape
    if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return None
    if shape is None or not isinstance(shape[-1], int):
        return None
    first = _flattened(inputs[0])
    if is_op(node, "MatMul"):
        held = constant_array(inputs[1]) if inputs[1] is not None else None
        return [first, inputs[1]] if first is not None and held is not None and held.ndim == 2 else None
    if is_op(node, *_ON_ROWS):
        axis = match.int_attribute(node, "axis", -1)
        return [first, *inputs[1:]] if first is not None and axis == -1 else None
    if is_op(node, *_OF_TWO):
        return _lifted_pair(inputs)
    return None


def _lifted_pair(inputs: list[ir.Value | None]) -> list[ir.Value | None] | None:
    lifted: list[ir.Value | None] = []
    for value in inputs:
        held = constant_array(value) if value is not None else None
        flat = _flattened(value)
        if held is not None and held.ndim <= 1:
            lifted.append(value)
        elif flat is not None:
            lifted.append(flat)
        else:
            return None
    whole = [v.shape for v, old in zip(lifted, inputs, strict=True) if v is not old and v is not None]
    return lifted if len(whole) == 1 or (len(whole) == 2 and whole[0] == whole[1]) else None


def _exchange(model: ir.Model, node: ir.Node, inputs: list[ir.Value | None], workspace: Workspace) -> ir.Node:
    """Let ``node`` read ``inputs``, and reshape its result; returns the new reshape."""
    old = node.outputs[0]
    assert old.shape is not None and node.graph is not None
    width = old.shape[-1]
    lead = next(
        v.shape for v, before in zip(inputs, node.inputs, strict=True) if v is not before and v is not None
    )
    assert lead is not None and isinstance(width, int)
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    target = new_initializer(model, f"{old.name}_rows", np.array([-1, width], np.int64), workspace)
    reshape = match.new_node("", "Reshape", [old, target], {}, [node])
    flat = reshape.outputs[0]
    old.replace_all_uses_with(flat)
    reshape.replace_input_with(0, old)
    node.graph.insert_after(node, reshape)
    flat.name, flat.type, flat.shape = f"{old.name}_rows_out", old.type, old.shape
    old.shape = ir.Shape([lead[0], lead[1], width])
    return reshape


def undo(model: ir.Model, node: ir.Node, x: ir.Value | None) -> int:
    """Reshape(Reshape(x, ..), shape of x) -> x; ``x`` is None where ``node`` reads no such Reshape."""
    value = node.outputs[0]
    if x is None or x.shape is None or value.shape is None or value.is_graph_output():
        return 0
    if not same_shape(x.shape, value.shape):
        return 0
    above = match.producer(node.inputs[0])
    value.replace_all_uses_with(x)
    match.remove_dead(model.graph, [n for n in (node, above) if n is not None])
    return 1
