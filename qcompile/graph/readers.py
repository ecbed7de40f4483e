"""Who reads a value, seen through operators that keep its last axis."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.functions import is_op
from qcompile.graph.linears import VIEWS, Linear


@dataclasses.dataclass(frozen=True)
class Other:
    """A reader that is no linear: gets an inserted ``x * s + z`` when the producer is changed."""

    node: ir.Node | None  # None: the value is an output of the graph
    value: ir.Value
    index: int = 0


def readers(value: ir.Value, linears: dict[int, Linear]) -> tuple[list[Linear], list[Other]]:
    """All readers of ``value``, seen through operators that keep its last axis."""
    found: list[Linear] = []
    others = [Other(None, value)] if value.is_graph_output() else []
    for use in value.uses():
        linear = linears.get(id(use.node))
        if linear is not None and use.idx == 0:
            found.append(linear)
        elif keeps_last_axis(use.node, use.idx, value):
            below, beside = readers(use.node.outputs[0], linears)
            if below and not beside:
                found.extend(below)
            else:
                others.append(Other(use.node, value, use.idx))
        elif not is_op(use.node, "Shape"):
            others.append(Other(use.node, value, use.idx))
    return found, others


def table_readers(head: Linear) -> list[ir.Node] | None:
    """The lookups that share a tied head's table; None when it has any other reader."""
    uses = [use for use in head.weight.uses() if use.node is not head.holder[0]]
    lookups = [use.node for use in uses if is_op(use.node, "Gather") and use.idx == 0]
    whole_rows = all(match.int_attribute(node, "axis", 0) == 0 for node in lookups)
    alone = match.only_consumer(head.holder[0].outputs[0]) is head.node and head.weight.is_initializer()
    return lookups if len(lookups) == len(uses) and whole_rows and alone else None


def keeps_last_axis(node: ir.Node, index: int, value: ir.Value) -> bool:
    """Whether the last axis of ``value``, input ``index`` of ``node``, is the last axis of its output as it is."""
    if index != 0:
        return False
    if is_op(node, "Identity", "Dropout"):
        return True
    output = node.outputs[0]
    same = value.shape is not None and output.shape is not None and _last(value) == _last(output) is not None
    if is_op(node, "Reshape", "Slice", "GatherND", "Expand", *VIEWS):
        return same
    if is_op(node, "Gather"):
        rank = len(value.shape) if value.shape is not None else 0
        return same and 0 <= match.int_attribute(node, "axis", 0) < rank - 1
    return False


def _last(value: ir.Value) -> int | None:
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None
