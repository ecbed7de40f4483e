"""Scaled dot-product attention, however it is spelled, becomes one node.

    softmax(q k^T scale + bias) v   ->  qcompile.Attention(q, k, v, bias){scale}
    with k and v repeated per group ->  qcompile.GroupedAttention(q, k, v, bias){scale, groups}

A row of the softmax that is masked everywhere is undefined in the source (NaN, or 0 after IsNaN/Where) and
uniform here; such rows are padding.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.functions import DOMAIN, use
from qcompile.graph.workspace import Workspace

MASKED = np.float32(-1e30)  # finite stand-in for -inf: two of them still add up to a float


@dataclasses.dataclass
class _Scores:
    """scale * (q k^T) + sum of biases, read from the softmax upwards."""

    product: ir.Node
    scale: float
    biases: list[tuple[ir.Value, float]]
    wheres: list[tuple[ir.Node, int]]


def rewrite(model: ir.Model, workspace: Workspace) -> tuple[int, list[match.Unrecognised]]:
    """Recognise every attention; returns how many, and the softmaxes that were left with the reason."""
    count, left = 0, []
    for softmax in match.nodes(model.graph, "Softmax"):
        scores = _read_scores(softmax.inputs[0])
        if scores is None:
            continue  # a softmax that is no attention
        reason = _replace(model, softmax, scores, workspace)
        if reason:
            left.append(match.Unrecognised(softmax, reason))
        else:
            count += 1
    for node in match.nodes(model.graph, "Attention"):
        _group(model, node)
    return count, left


# --------------------------------------------------------------------------- upwards from the softmax


def _read_scores(value: ir.Value | None) -> _Scores | None:
    found = _Scores(None, 1.0, [], [])  # type: ignore[arg-type]
    return found if _descend(value, found) else None


def _descend(value: ir.Value | None, found: _Scores) -> bool:
    """Follow ``value`` to the product of two activations, noting what is multiplied and added on the way."""
    node = match.producer(value, "Cast", "Mul", "Div", "Add", "Where", "MatMul")
    if node is None:
        return False
    if node.op_type == "MatMul":
        found.product = node
        return all(constant_array(v) is None for v in node.inputs)
    if node.op_type == "Cast":
        return _descend(node.inputs[0], found)
    if node.op_type in ("Mul", "Div"):
        return _descend_scale(node, found)
    if node.op_type == "Where":
        return _descend_where(node, found)
    return any(_try_add(node, path, found) for path in (0, 1))


def _descend_scale(node: ir.Node, found: _Scores) -> bool:
    operands = match.constant_operand(node)
    if (
        operands is None
        or operands[1].size != 1
        or (node.op_type == "Div" and operands[0] is not node.inputs[0])
    ):
        return False
    factor = float(operands[1].reshape(-1)[0])
    found.scale *= factor if node.op_type == "Mul" else 1 / factor
    return _descend(operands[0], found)


def _descend_where(node: ir.Node, found: _Scores) -> bool:
    for path, filler in ((1, 2), (2, 1)):
        held = match.scalar(node.inputs[filler])
        if held is not None and held < -1e3:
            found.wheres.append((node, path))
            return _descend(node.inputs[path], found)
    return False


def _try_add(node: ir.Node, path: int, found: _Scores) -> bool:
    trial = _Scores(None, found.scale, list(found.biases), list(found.wheres))  # type: ignore[arg-type]
    bias = node.inputs[1 - path]
    if bias is None or not _descend(node.inputs[path], trial):
        return False
    trial.biases.append((bias, found.scale))
    found.product, found.scale, found.biases, found.wheres = (
        trial.product,
        trial.scale,
        trial.biases,
        trial.wheres,
    )
    return True


# --------------------------------------------------------------------------- the replacement


def _replace(model: ir.Model, softmax: ir.Node, scores: _Scores, workspace: Workspace) -> str:
    """Rewrite one attention; returns the reason when it must stay."""
    if match.int_attribute(softmax, "axis", -1) not in (-1, 3):
        return "softmax is not over the last axis"
    end = _context_product(softmax)
    if end is None:
        return "the probabilities have another reader, or are not multiplied by values"
    q, q_scale = _unscaled(scores.product.inputs[0])
    keys = _untransposed(scores.product, scores.product.inputs[1])
    if keys is None:
        return "keys are not transposed in a known way"
    k, k_scale = keys
    v = end.inputs[1]
    if q is None or v is None or any(x.shape is None or len(x.shape) != 4 for x in (q, k, v)):
        return "queries, keys and values are not of rank 4"
    bias = _bias(model, scores, end, workspace)
    use(model, "Attention")
    scale = ir.AttrFloat32("scale", scores.scale * q_scale * k_scale)
    node = match.new_node(DOMAIN, "Attention", [q, k, v, bias], {"s": scale}, [end])
    sources = [n for value in end.inputs if value is not None and (n := value.producer()) is not None]
    match.put_instead(end, node)
    match.remove_dead(model.graph, sources)
    return ""


def _heads(value: ir.Value) -> int | None:
    heads = value.shape[1] if value.shape is not None else None
    return heads if isinstance(heads, int) else None


def _group(model: ir.Model, node: ir.Node) -> None:
    """Attention over repeated, or broadcast, key heads  ->  GroupedAttention over the heads themselves."""
    if node.domain != DOMAIN:
        return
    q, k, v, bias = node.inputs
    assert q is not None and k is not None and v is not None
    (k, groups), (v, same) = _unrepeated(k, q), _unrepeated(v, q)
    if groups == 1 and _heads(k) == _heads(v) == 1:
        groups = same = _heads(q) or 1  # multi-query
    if groups == 1 or groups != same:
        return
    use(model, "GroupedAttention")
    attributes = {"s": node.attributes["scale"], "g": ir.AttrInt64("groups", groups)}
    repeats = [n for value in node.inputs[1:3] if (n := match.producer(value)) is not None]
    match.put_instead(node, match.new_node(DOMAIN, "GroupedAttention", [q, k, v, bias], attributes, [node]))
    match.remove_dead(model.graph, repeats)


def _context_product(softmax: ir.Node) -> ir.Node | None:
    """The MatMul(probabilities, values), past Cast, Dropout and the exporter's IsNaN/Where."""
    value = softmax.outputs[0]
    while True:
        users = {id(n): n for n in match.consumers(value)}.values()
        if value.is_graph_output():
            return None
        kinds = sorted(n.op_type for n in users)
        if kinds == ["IsNaN", "Where"]:
            where = next(n for n in users if n.op_type == "Where")
            if where.inputs[2] is not value or match.scalar(where.inputs[1]) != 0.0:
                return None
            value = where.outputs[0]
        elif kinds in (["Cast"], ["Dropout"]):
            value = next(iter(users)).outputs[0]
        elif kinds == ["MatMul"]:
            node = next(iter(users))
            return node if node.inputs[0] is value else None
        else:
            return None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    node = match.producer(value, "Mul", "Div")
    operands = match.constant_operand(node) if node is not None else None
    if node is None or operands is None or operands[1].size != 1:
        return value, 1.0
    factor = float(operands[1].reshape(-1)[0])
    if node.op_type == "Div":
        if operands[0] is not node.inputs[0]:
            return value, 1.0
        factor = 1 / factor
    return operands[0], factor


def _untransposed(product: ir.Node, value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """(k, factor) with value = factor * k^T over the last two axes."""
    value, factor = _unscaled(value)
    node = match.producer(value, "Transpose", "Reshape")
    if node is None:
        return None
    if node.op_type == "Reshape":
        return _flattened_transpose(node, factor)
    permutation = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else []
    source = node.inputs[0]
    if source is None:
        return None
    if permutation == [0, 1, 3, 2]:
        inner, more = _unscaled(source)
        return (inner, factor * more) if inner is not None else None
    if permutation != [0, 2, 3, 1]:
        return None
    swapped = match.new_node("", "Transpose", [source], {"p": ir.AttrInt64s("perm", [0, 2, 1, 3])}, [node])
    assert product.graph is not None
    product.graph.insert_before(node, swapped)
    result = swapped.outputs[0]
    result.name, result.type = f"{node.outputs[0].name}_keys", node.outputs[0].type
    if source.shape is not None and len(source.shape) == 4:
        result.shape = ir.Shape([source.shape[i] for i in (0, 2, 1, 3)])
    return result, factor


def _flattened_transpose(node: ir.Node, factor: float) -> tuple[ir.Value, float] | None:
    """The exporter's Reshape(Transpose(Reshape(k, [-1, T, d]), [0, 2, 1]), [B, H, d, T])."""
    middle = match.producer(node.inputs[0], "Transpose")
    first = match.producer(middle.inputs[0], "Reshape") if middle is not None else None
    if middle is None or first is None or list(middle.attributes["perm"].as_ints()) != [0, 2, 1]:
        return None
    inner, more = _unscaled(first.inputs[0])
    return (inner, factor * more) if inner is not None else None


def _unrepeated(value: ir.Value, q: ir.Value) -> tuple[ir.Value, int]:
    """(the value before Unsqueeze, Expand, Reshape repeat its heads, how often)."""
    reshape = match.producer(value, "Reshape")
    expand = match.producer(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = match.producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    source = unsqueeze.inputs[0] if unsqueeze is not None else None
    if unsqueeze is None or source is None or source.shape is None or len(source.shape) != 4:
        return value, 1
    heads, all_heads = source.shape[1], q.shape[1] if q.shape is not None else None
    if match.scalar(unsqueeze.inputs[1]) != 2 or not isinstance(heads, int) or not isinstance(all_heads, int):
        return value, 1
    return source, all_heads // heads


def _bias(model: ir.Model, scores: _Scores, before: ir.Node, workspace: Workspace) -> ir.Value:
    """One additive bias out of all masks and biases, with -inf made finite."""
    zero = new_initializer(model, "attention_zero", np.zeros((), np.float32), workspace)
    terms = [_scaled_bias(model, value, factor, before, workspace) for value, factor in scores.biases]
    terms += [_where_bias(node, path, zero, before) for node, path in scores.wheres]
    for value in list(terms):
        make_finite(model, value, workspace)
    total = terms[0] if terms else zero
    for term in terms[1:]:
        total = _inserted(before, "Add", [total, term])
    return total


def _inserted(before: ir.Node, op: str, inputs: list[ir.Value | None]) -> ir.Value:
    node = match.new_node("", op, inputs, {}, [before])
    assert before.graph is not None
    before.graph.insert_before(before, node)
    node.outputs[0].name = f"{before.outputs[0].name}_bias_{len(before.graph)}"
    node.outputs[0].dtype = ir.DataType.FLOAT
    return node.outputs[0]


def _scaled_bias(
    model: ir.Model, value: ir.Value, factor: float, before: ir.Node, workspace: Workspace
) -> ir.Value:
    if factor == 1.0:
        return value
    held = new_initializer(model, "attention_bias_scale", np.asarray(factor, np.float32), workspace)
    return _inserted(before, "Mul", [value, held])


def _where_bias(node: ir.Node, path: int, zero: ir.Value, before: ir.Node) -> ir.Value:
    inputs = list(node.inputs)
    inputs[path] = zero
    return _inserted(before, "Where", inputs)


def make_finite(model: ir.Model, value: ir.Value, workspace: Workspace) -> None:
    """Replace -inf constants that feed ``value`` (through Where, Add, Mul and views)."""
    pending, seen = [value], set()
    while pending:
        node = match.producer(
            pending.pop(), "Where", "Add", "Mul", "Cast", "Expand", "Unsqueeze", "Slice", "Reshape"
        )
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        for index, source in enumerate(node.inputs):
            held = constant_array(source) if source is not None else None
            if held is None:
                if source is not None:
                    pending.append(source)
            elif held.dtype == np.float32 and np.isneginf(held).any():
                finite = np.where(np.isneginf(held), MASKED, held)
                node.replace_input_with(index, new_initializer(model, "mask_constant", finite, workspace))
