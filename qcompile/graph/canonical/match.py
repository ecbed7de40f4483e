"""Small helpers to read the graph around a node; shared by every recogniser."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.graph.edits import constant_array
from qcompile.graph.functions import is_op
from qcompile.graph.provenance import inherit


@dataclasses.dataclass(frozen=True)
class Unrecognised:
    """A node that stays as it is although it is the core of something that is recognised, and why."""

    node: ir.Node
    reason: str


def producer(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that makes ``value`` if it is one of ``ops`` (any when none is named)."""
    node = value.producer() if value is not None else None
    if node is None or not ops:
        return node
    return node if is_op(node, *ops) else None


def consumers(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def only_consumer(value: ir.Value, *ops: str) -> ir.Node | None:
    """The one node that reads ``value``, if it is the only reader and one of ``ops``."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if not ops or is_op(node, *ops) else None


def scalar(value: ir.Value | None) -> float | None:
    """The number held by a constant of one element."""
    array = constant_array(value) if value is not None else None
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def constant_operand(node: ir.Node) -> tuple[ir.Value, np.ndarray] | None:
    """For a binary node with one constant operand: (the other operand, the constant)."""
    left, right = node.inputs[0], node.inputs[1]
    for other, held in ((left, right), (right, left)):
        array = constant_array(held) if held is not None else None
        if array is not None and other is not None and constant_array(other) is None:
            return other, array
    return None


def constant_vector(value: ir.Value | None, depth: int = 4) -> np.ndarray | None:
    """The content of a small constant, also when nodes still compute it (Gemma's gain is 1 + weight)."""
    array = constant_array(value)
    if array is not None or depth == 0:
        return array if array is not None and array.size <= _VECTOR else None
    node = producer(value, "Add", "Sub", "Mul", "Cast")
    if node is None:
        return None
    operands = [held for v in node.inputs if (held := constant_vector(v, depth - 1)) is not None]
    if len(operands) != len(node.inputs):
        return None
    if node.op_type == "Cast":
        return np.asarray(operands[0], np.float32) if _to_float(node) else None
    return np.asarray(_ARITHMETIC[node.op_type](*operands))


_VECTOR = 1 << 20  # elements
_ARITHMETIC = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}


def _to_float(node: ir.Node) -> bool:
    return node.attributes["to"].as_int() == int(ir.DataType.FLOAT)


def other_operand(node: ir.Node, known: ir.Value) -> ir.Value | None:
    left, right = node.inputs[0], node.inputs[1]
    return right if left is known else left if right is known else None


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return int(attribute.value) if attribute is not None else default


def through(value: ir.Value | None, *ops: str) -> ir.Value | None:
    """Follow ``value`` upwards through single-input nodes of the kinds ``ops``."""
    while value is not None and (node := producer(value, *ops)) is not None:
        value = node.inputs[0]
    return value


def new_node(
    domain: str,
    op: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, ir.Attr],
    like: Sequence[ir.Node],
) -> ir.Node:
    """A node with one output that carries the provenance of the nodes it replaces (the last one's names)."""
    node = ir.Node(domain, op, inputs, list(attributes.values()), num_outputs=1)
    inherit(node, list(like))
    return node


def put_instead(old: ir.Node, new: ir.Node) -> None:
    """Put ``new`` at the place of ``old`` (one output each); names, type and shape of the value stay."""
    value, replacement = old.outputs[0], new.outputs[0]
    replacement.type, replacement.shape = value.type, value.shape
    graph = old.graph
    assert graph is not None
    graph.insert_before(old, new)
    name = value.name
    value.replace_all_uses_with(replacement, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    replacement.name = name


def remove_dead(graph: ir.Graph, roots: Sequence[ir.Node]) -> None:
    """Remove ``roots`` and everything above them that nothing reads any more."""
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node.graph is None or any(o.is_graph_output() or o.uses() for o in node.outputs):
            continue
        sources = [n for v in node.inputs if v is not None and (n := v.producer()) is not None]
        graph.remove(node, safe=True)
        pending.extend(sources)


def nodes(graph: ir.Graph, *ops: str) -> Iterator[ir.Node]:
    """The nodes of kind ``ops``, safe to rewrite while iterating."""
    for node in list(graph):
        if node.graph is not None and is_op(node, *ops):
            yield node
