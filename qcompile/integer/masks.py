"""Attention masks as flags: where a float mask of 0 and very negative numbers is 0."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array
from qcompile.graph.functions import is_op
from qcompile.integer.emit import Emitter

FAR = -1e4  # a number below this takes a token out
_VIEWS = ("Identity", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand", "Slice", "Concat")
BOOL = ir.DataType.BOOL


class NoFlags(Exception):
    """The mask is no such mask; the argument says what stands in the way."""


def flags_of(value: ir.Value, emit: Emitter) -> ir.Value:
    """bool like ``value``, True where it is 0. Raises NoFlags where it is anything but 0 or far below it."""
    held = constant_array(value)
    if held is not None:
        if not ((held == 0) | (held < FAR)).all():
            raise NoFlags("the mask holds numbers that are neither 0 nor far below it")
        return emit.constant(held == 0, "mask")
    node = value.producer()
    if node is None:
        raise NoFlags(f"the mask comes from the float input '{value.name}'")
    if is_op(node, "Where"):
        return _chosen(node, emit)
    if is_op(node, "Add"):
        return emit.put("And", [flags_of(v, emit) for v in node.inputs if v is not None], BOOL)
    if is_op(node, *_VIEWS):
        data = len(node.inputs) if node.op_type == "Concat" else 1
        inputs = [flags_of(v, emit) if i < data and v is not None else v for i, v in enumerate(node.inputs)]
        return emit.put(node.op_type, inputs, BOOL, **{a.name: a.value for a in node.attributes.values()})
    if is_op(node, "Mul"):
        return _scaled(node, emit)
    raise NoFlags(f"{node.op_type} is in the way to the mask's flags")


def _chosen(node: ir.Node, emit: Emitter) -> ir.Value:
    """Where(c, x, y): c and x, or else y."""
    condition, kept, other = node.inputs
    ends = [constant_array(v) for v in (kept, other)]
    if all(end is not None and end.size == 1 for end in ends):
        first, second = (float(end.reshape(-1)[0]) for end in ends)  # type: ignore[union-attr]
        if first == 0 and second < FAR:
            return condition  # type: ignore[return-value]
        if second == 0 and first < FAR:
            return emit.put("Not", [condition], BOOL)
    parts = [flags_of(v, emit) for v in (kept, other) if v is not None]
    chosen = [
        emit.put("And", pair, BOOL) for pair in zip((condition, emit.put("Not", [condition], BOOL)), parts, strict=True)
    ]
    return emit.put("Or", chosen, BOOL)


def _scaled(node: ir.Node, emit: Emitter) -> ir.Value:
    """(1 - mask) * far, the mask a Cast of flags or of 0 and 1."""
    found = match.constant_operand(node)
    minus = match.producer(found[0], "Sub") if found is not None else None
    if found is None or minus is None or found[1].size != 1 or found[1].reshape(-1)[0] > FAR:
        raise NoFlags("a product that is not (1 - mask) times a very negative number")
    if match.scalar(minus.inputs[0]) != 1:
        raise NoFlags("a product that is not (1 - mask) times a very negative number")
    cast = match.producer(match.through(minus.inputs[1], *_VIEWS), "Cast")
    if cast is None or minus.inputs[1] is not cast.outputs[0]:
        raise NoFlags("a mask that is no Cast of flags")
    return emit.cast(cast.inputs[0], BOOL)  # type: ignore[arg-type]


def all_true(emit: Emitter) -> ir.Value:
    return emit.constant(np.ones((1, 1, 1, 1), bool), "mask")
