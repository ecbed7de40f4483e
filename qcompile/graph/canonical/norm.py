"""LayerNorm and RMSNorm, however they are spelled, become one node each.

y = (x - mean(x)) / sqrt(var(x) + eps) * gamma + beta   ->  LayerNormalization(x, gamma, beta)
y = x / sqrt(mean(x^2) + eps) * gamma                   ->  qcompile.RMSNormalization(x, gamma)
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.functions import DOMAIN, is_op, use
from qcompile.graph.workspace import Workspace


@dataclasses.dataclass
class _Spelled:
    """What was found around a Sqrt: the input, whether its mean is removed, and the last node so far."""

    x: ir.Value
    centred: bool
    epsilon: float
    end: ir.Node
    gamma: np.ndarray | None = None
    beta: np.ndarray | None = None


def rewrite(model: ir.Model, workspace: Workspace) -> int:
    """Recognise every spelled-out norm over the last axis; returns how many."""
    count = 0
    for node in match.nodes(model.graph, "Sqrt"):
        found = _around(node)
        if found is not None:
            count += _replace(model, found, workspace)
    for node in match.nodes(model.graph, "RMSNormalization"):
        _hold_parameters(model, node, workspace)
        count += _standard_rms(model, node)
    for node in match.nodes(model.graph, "LayerNormalization"):
        _hold_parameters(model, node, workspace)
        count += _complete_layer_norm(model, node, workspace)
    return count


def _around(root: ir.Node) -> _Spelled | None:
    shifted = match.producer(root.inputs[0], "Add")
    operands = match.constant_operand(shifted) if shifted is not None else None
    mean = match.producer(operands[0], "ReduceMean") if operands is not None else None
    if operands is None or mean is None or operands[1].size != 1 or not _last_axis(mean):
        return None
    centred = _squared(mean.inputs[0])
    if centred is None:
        return None
    normal = _normalised(root, centred)
    if normal is None:
        return None
    x = _uncentred(centred)
    found = _Spelled(x or centred, x is not None, float(operands[1].reshape(-1)[0]), normal)
    _take_affine(found)
    return found


def _last_axis(mean: ir.Node) -> bool:
    attribute = mean.attributes.get("axes")
    axes = np.asarray(attribute.value) if attribute is not None else None
    if axes is None and len(mean.inputs) > 1 and mean.inputs[1] is not None:
        axes = constant_array(mean.inputs[1])
    if axes is None or axes.size != 1 or match.int_attribute(mean, "keepdims", 1) != 1:
        return False
    axis, shape = int(axes.reshape(-1)[0]), mean.inputs[0].shape if mean.inputs[0] is not None else None
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _squared(value: ir.Value | None) -> ir.Value | None:
    node = match.producer(value, "Pow", "Mul")
    if node is None:
        return None
    if node.op_type == "Pow":
        return node.inputs[0] if match.scalar(node.inputs[1]) == 2.0 else None
    return node.inputs[0] if node.inputs[0] is node.inputs[1] else None


def _normalised(root: ir.Node, centred: ir.Value) -> ir.Node | None:
    """The node that divides ``centred`` by the root: Div, or Mul with the Reciprocal."""
    divide = match.only_consumer(root.outputs[0], "Div", "Reciprocal")
    if divide is None:
        return None
    if divide.op_type == "Reciprocal":
        multiply = match.only_consumer(divide.outputs[0], "Mul")
        return (
            multiply
            if multiply is not None and match.other_operand(multiply, divide.outputs[0]) is centred
            else None
        )
    if divide.inputs[0] is centred:
        return divide
    inverse = match.scalar(divide.inputs[0]) == 1.0
    multiply = match.only_consumer(divide.outputs[0], "Mul") if inverse else None
    return (
        multiply
        if multiply is not None and match.other_operand(multiply, divide.outputs[0]) is centred
        else None
    )


def _uncentred(centred: ir.Value) -> ir.Value | None:
    subtract = match.producer(centred, "Sub")
    if subtract is None:
        return None
    mean = match.producer(subtract.inputs[1], "ReduceMean")
    if mean is None or mean.inputs[0] is not subtract.inputs[0] or not _last_axis(mean):
        return None
    return subtract.inputs[0]


def _take_affine(found: _Spelled) -> None:
    scale = match.only_consumer(found.end.outputs[0], "Mul")
    held = _vector(scale)
    if scale is None or held is None:
        return
    found.gamma, found.end = held, scale
    if not found.centred:
        return
    shift = match.only_consumer(scale.outputs[0], "Add")
    held = _vector(shift)
    if shift is not None and held is not None:
        found.beta, found.end = held, shift


def _vector(node: ir.Node | None) -> np.ndarray | None:
    """The constant operand of ``node`` when it is one number for each channel."""
    for value in node.inputs if node is not None else ():
        held = match.constant_vector(value)
        if held is not None:
            return held.reshape(-1) if held.size > 1 and held.shape[-1] == held.size else None
    return None


def _replace(model: ir.Model, found: _Spelled, workspace: Workspace) -> bool:
    width = _width(found)
    if width is None or found.x.dtype not in (None, ir.DataType.FLOAT):
        return False
    gamma = found.gamma if found.gamma is not None else np.ones(width, np.float32)
    hint = found.end.outputs[0].name or "norm"
    inputs = [found.x, new_initializer(model, f"{hint}.gamma", gamma.astype(np.float32), workspace)]
    epsilon = ir.AttrFloat32("epsilon", found.epsilon)
    if found.centred:
        beta = found.beta if found.beta is not None else np.zeros(width, np.float32)
        inputs.append(new_initializer(model, f"{hint}.beta", beta.astype(np.float32), workspace))
        node = match.new_node(
            "", "LayerNormalization", inputs, {"e": epsilon, "a": ir.AttrInt64("axis", -1)}, [found.end]
        )
    else:
        use(model, "RMSNormalization")
        node = match.new_node(DOMAIN, "RMSNormalization", inputs, {"e": epsilon}, [found.end])
    sources = [n for v in found.end.inputs if v is not None and (n := v.producer()) is not None]
    match.put_instead(found.end, node)
    match.remove_dead(model.graph, sources)
    return True


def _width(found: _Spelled) -> int | None:
    if found.gamma is not None:
        return int(found.gamma.size)
    shape = found.x.shape
    return int(shape[-1]) if shape is not None and isinstance(shape[-1], int) else None


def _hold_parameters(model: ir.Model, node: ir.Node, workspace: Workspace) -> None:
    """Gains and shifts that nodes still compute out of constants (1 + weight) become initializers."""
    for index, value in enumerate(node.inputs[1:], 1):
        held = match.constant_vector(value) if value is not None and constant_array(value) is None else None
        if value is not None and held is not None:
            new = new_initializer(model, f"{value.name}_held", held.astype(np.float32), workspace)
            node.replace_input_with(index, new)


def _standard_rms(model: ir.Model, node: ir.Node) -> int:
    """ONNX's RMSNormalization (opset 23) over the last axis becomes the project's function."""
    if node.domain == DOMAIN or not _is_over_last(node):
        return 0
    use(model, "RMSNormalization")
    epsilon = node.attributes.get("epsilon", ir.AttrFloat32("epsilon", 1e-5))
    match.put_instead(
        node, match.new_node(DOMAIN, "RMSNormalization", node.inputs[:2], {"e": epsilon}, [node])
    )
    return 1


def _complete_layer_norm(model: ir.Model, node: ir.Node, workspace: Workspace) -> int:
    """A LayerNormalization without bias gets a zero one, so that a shift can fold into it."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return 0
    gamma = constant_array(node.inputs[1]) if node.inputs[1] is not None else None
    if gamma is None:
        return 0
    beta = new_initializer(model, f"{node.outputs[0].name}.beta", np.zeros_like(gamma), workspace)
    whole = match.new_node("", "LayerNormalization", [*node.inputs[:2], beta], dict(node.attributes), [node])
    match.put_instead(node, whole)
    return 1


# --------------------------------------------------------------------------- what is almost a norm


def misses(graph: ir.Graph) -> list[match.Unrecognised]:
    """Norms but for one detail: a mean of squares that divides what was squared, or a gain made at run time."""
    found = []
    for mean in match.nodes(graph, "ReduceMean"):
        centred = _squared(mean.inputs[0])
        path = _to_quotient(mean, centred) if centred is not None else []
        if path:
            found.append(match.Unrecognised(mean, f"not seen as a norm: {_detail(mean, path)}"))
    for node in match.nodes(graph, "LayerNormalization", "RMSNormalization"):
        factor = match.only_consumer(node.outputs[0], "Mul")
        if factor is not None and _is_plain(node) and match.constant_operand(factor) is None:
            reason = "not seen as the gain of a norm: the factor is computed at run time"
            found.append(match.Unrecognised(factor, reason))
        if not _is_over_last(node):
            found.append(match.Unrecognised(node, "not seen as a norm: it is not over the last axis alone"))
    return found


def _to_quotient(mean: ir.Node, centred: ir.Value) -> list[ir.Node]:
    """The nodes from ``mean`` (without it) to the product or quotient with ``centred``; empty if there is none."""
    paths = [[node] for node in match.consumers(mean.outputs[0])]
    while paths:
        path = paths.pop(0)
        node, value = path[-1], (path[-2] if len(path) > 1 else mean).outputs[0]
        if len(path) > 1 and is_op(node, "Mul", "Div") and match.other_operand(node, value) is centred:
            return path
        if len(path) < _LONGEST and is_op(node, *_BETWEEN):
            paths += [[*path, below] for below in match.consumers(node.outputs[0])]
    return []


_LONGEST = 6  # nodes from the mean to the quotient: Add, Sqrt, Reciprocal, Mul and two more
_BETWEEN = ("Add", "Sqrt", "Reciprocal", "Pow", "Div", "Max", "Clip", "Cast", "Mul", "Unsqueeze", "Expand", "Identity")


def _detail(mean: ir.Node, path: list[ir.Node]) -> str:
    """The first step that the recogniser does not know."""
    shifted, root = path[0], path[1]
    if mean.outputs[0].dtype == ir.DataType.DOUBLE:
        return "it is computed in float64"
    if not _last_axis(mean):
        return "its mean is not over the last axis alone, or drops that axis"
    if not is_op(shifted, "Add"):
        return f"{shifted.op_type} follows its mean, where an epsilon is added"
    epsilon = match.constant_operand(shifted)
    if epsilon is None or epsilon[1].size != 1:
        return "its epsilon is computed at run time" if epsilon is None else "its epsilon is not one number"
    if not is_op(root, "Sqrt"):
        return f"its root is spelled as {root.op_type}"
    if any(match.only_consumer(node.outputs[0]) is None for node in path[1:-1]):
        return "its root has another reader"
    if [node.op_type for node in path[2:]] in (["Div"], ["Reciprocal", "Mul"], ["Div", "Mul"]):
        return "the size of its last axis is unknown"
    return "its root divides in other steps than Div, or Mul by the reciprocal"


def _is_plain(norm: ir.Node) -> bool:
    """Whether the gain is all ones and the shift zero, or absent."""
    gamma, *beta = (constant_array(value) for value in norm.inputs[1:])
    return bool(gamma is not None and (gamma == 1).all() and all(b is not None and not b.any() for b in beta))


def _is_over_last(norm: ir.Node) -> bool:
    axis, shape = match.int_attribute(norm, "axis", -1), norm.inputs[0].shape if norm.inputs[0] is not None else None
    return axis == -1 or (shape is not None and axis == len(shape) - 1)
