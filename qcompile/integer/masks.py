"""Attention masks as flags: where a float mask of 0 and very negative numbers is 0."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array
from qcompile.graph.functions import is_op
from qcompile.integer.emit import Emitter

FAR = -1e3  # a number below this takes a token out; files in use hold -1e4, in bfloat16 -9984
_VIEWS = ("Identity", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Expand", "Slice", "Concat")
BOOL = ir.DataType.BOOL


@dataclasses.dataclass(frozen=True)
class Slopes:
    """Numbers that a mask adds to the scores: ``integers`` (B, H, S, T) times ``factor``; both broadcast."""

    integers: ir.Value
    factor: np.ndarray


class NoFlags(Exception):
    """The mask is no such mask; the argument says what stands in the way."""


def flags_of(value: ir.Value, emit: Emitter) -> ir.Value:
    """bool like ``value``, True where it is 0. Raises NoFlags where it is anything but 0 or far below it."""
    found = _flags(value, emit)
    if found.shape is None:
        found.shape = value.shape
    return found


def _flags(value: ir.Value, emit: Emitter) -> ir.Value:
    held = constant_array(value)
    if held is not None:
        if not ((held == 0) | (held < FAR)).all():
            raise NoFlags("the mask holds numbers that are neither 0 nor far below it")
        return _known(held == 0, emit)
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


def split(value: ir.Value, emit: Emitter) -> tuple[ir.Value, np.ndarray | Slopes | None]:
    """The flags of a mask, and what it adds to the scores besides. Raises NoFlags."""
    array, rest = constant_array(value), None
    if array is None:
        node = value.producer()
        found = match.constant_operand(node) if is_op(node, "Add") else None  # type: ignore[arg-type]
        if found is None:
            return _sloped(node, emit) or (flags_of(value, emit), None)
        rest, array = found
    near = ~(array < FAR)
    if not np.isfinite(array[near]).all():
        raise NoFlags("the mask holds numbers that are not finite")
    flags = _known(near, emit)
    bias = np.where(near, array, 0) if array[near].any() else None
    if rest is None:
        return flags, bias
    others = flags_of(rest, emit)
    if near.all():
        return others, bias
    both = emit.put("And", [others, flags], BOOL)
    both.shape = value.shape
    return both, bias


def _sloped(node: ir.Node | None, emit: Emitter) -> tuple[ir.Value, Slopes] | None:
    """The flags and slopes of a sum of both."""
    if not is_op(node, "Add"):
        return None
    for slopes, flags in (node.inputs, node.inputs[::-1]):  # type: ignore[union-attr]
        found = _slopes(slopes, emit)
        if found is not None and flags is not None:
            return flags_of(flags, emit), found
    return None


def _slopes(value: ir.Value | None, emit: Emitter) -> Slopes | None:
    """``value`` as integers times constants, behind axes of one."""
    node = match.producer(value, "Unsqueeze", "Mul")
    if node is None or value is None or value.shape is None:
        return None
    if node.op_type == "Unsqueeze":
        below, axes = _slopes(node.inputs[0], emit), constant_array(node.inputs[1])
        if below is None or axes is None:
            return None
        wide = emit.put("Unsqueeze", [below.integers, node.inputs[1]], ir.DataType.INT64)
        return Slopes(wide, np.expand_dims(below.factor, tuple(int(axis) for axis in axes)))
    found = match.constant_operand(node)
    cast = match.producer(found[0], "Cast") if found is not None else None
    source = cast.inputs[0] if cast is not None else None
    if found is None or source is None or source.dtype != ir.DataType.INT64 or not np.isfinite(found[1]).all():
        return None
    if source.shape is None or len(source.shape) != len(value.shape) or found[1].ndim > len(value.shape):
        return None
    return Slopes(source, found[1].reshape((1,) * (len(value.shape) - found[1].ndim) + found[1].shape))


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
    far = found is not None and found[1].size == 1 and found[1].reshape(-1)[0] < FAR
    if minus is None or not far or match.scalar(minus.inputs[0]) != 1:
        raise NoFlags("a product that is not (1 - mask) times a very negative number")
    return _kept(minus.inputs[1], emit)


def _kept(value: ir.Value | None, emit: Emitter) -> ir.Value:
    """bool: where a float mask of ones and zeros is one."""
    node = match.producer(value, "Cast", *_VIEWS)
    if node is None or node.op_type == "Concat":
        raise NoFlags("a mask that is no Cast of flags")
    source = node.inputs[0]
    assert source is not None
    if node.op_type != "Cast":
        attributes = {a.name: a.value for a in node.attributes.values()}
        return emit.put(node.op_type, [_kept(source, emit), *node.inputs[1:]], BOOL, **attributes)
    if source.dtype is None or source.dtype.is_floating_point():
        raise NoFlags(f"the mask is made of the float '{source.name}'")
    return emit.cast(source, BOOL)


def all_true(emit: Emitter) -> ir.Value:
    return _known(np.ones((1, 1, 1, 1), bool), emit)


def _known(flags: np.ndarray, emit: Emitter) -> ir.Value:
    made = emit.constant(flags, "mask")
    made.shape = ir.Shape(flags.shape)
    return made
