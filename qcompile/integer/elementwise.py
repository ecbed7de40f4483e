"""What elementwise operators become in integers."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array
from qcompile.integer.convert import Converter, Refused, Rule
from qcompile.integer.values import Wide

GATE_PLACES = 15  # of what lies between -1 and 1
TABLE_PLACES = 11  # at least, of what a table is read by
MOST_MISSING = 4  # of these places: with more, numbers that calibration saw would saturate
MOST_DIVISOR = 29  # bits


def scale(c: Converter, node: ir.Node, x: Wide, factor: np.ndarray) -> None:
    """x times constants that broadcast to it."""
    if not np.isfinite(factor).all():
        raise Refused("a factor that is not finite")
    result = node.outputs[0]
    places, bound = c.places(result), c.bound(result)
    value = c.emit.requantize(x.value, x.bound, factor * 2.0 ** (places - x.places), -bound, bound)
    c.put(node, value, bound)


def product_of(c: Converter, a: Wide, b: Wide, places: int, bound: int) -> ir.Value:
    """a * b on a grid; b in 15 bits and a sign."""
    narrow = max(0, (b.bound - 1).bit_length() - 15)
    divisor = a.places + b.places - places - 16 - narrow  # bits
    if divisor > MOST_DIVISOR:  # a grid that is far too coarse for such a small product
        a = c.emit.rescaled(a, a.places - (divisor - MOST_DIVISOR), a.bound)
    lift = max(0, -divisor)
    end = bound >> lift
    shift = 2 ** min(max(divisor, 0), MOST_DIVISOR)
    made = c.emit.put("MultiplyWide", [a.value, b.value], narrow=2**narrow, divisor=shift, low=-end, high=end)
    return c.emit.put("Mul", [made, c.emit.int32(2**lift)]) if lift else made


def divide(c: Converter, node: ir.Node) -> None:
    """Div by constants."""
    value, other = node.inputs
    array = constant_array(other)
    if array is None:
        raise Refused("it divides by computed numbers")
    with np.errstate(divide="ignore"):
        scale(c, node, c.wide(value), 1 / array.astype(np.float64))


def power(c: Converter, node: ir.Node) -> None:
    """Pow by 2."""
    if match.scalar(node.inputs[1]) != 2:
        raise Refused("a power other than 2")
    x, result = c.wide(node.inputs[0]), node.outputs[0]
    places, bound = c.places(result), c.bound(result)
    c.put(node, product_of(c, x, x, places, bound), bound)


def negate(c: Converter, node: ir.Node) -> None:
    x = c.wide(node.inputs[0])
    c.put(node, c.emit.put("Neg", [x.value]), x.bound, x.places)


def choose(c: Converter, node: ir.Node) -> None:
    """Where of numbers, constant or not."""
    result = node.outputs[0]
    places, bound = c.places(result), c.bound(result)
    parts = [c.operand(v, places, bound) for v in node.inputs[1:]]
    c.put(node, c.emit.clip(c.emit.put("Where", [node.inputs[0], *parts]), -bound, bound), bound)


def _readable(c: Converter, value: ir.Value | None) -> Wide:
    """``value`` on a grid that is fine enough for a table."""
    x = c.wide(value)
    missing = TABLE_PLACES - x.places
    if missing > MOST_MISSING:
        raise Refused("its numbers are too large for a table")
    return x if missing <= 0 else c.emit.rescaled(x, TABLE_PLACES, min(x.bound << missing, 2**29))


def activation(c: Converter, node: ir.Node) -> None:
    x = _readable(c, node.inputs[0])
    kind = node.attributes.get("approximate")
    op = "IntegerGeluTanh" if kind is not None and kind.as_string() == "tanh" else f"Integer{node.op_type}"
    made = Wide(c.emit.put(op, [x.value], unit=2**x.places), x.places, x.bound)
    result = node.outputs[0]
    found = c.emit.rescaled(made, c.places(result), c.bound(result))
    c.put(node, found.value, found.bound)


def relu(c: Converter, node: ir.Node) -> None:
    x = c.wide(node.inputs[0])
    c.put(node, c.emit.put("Max", [x.value, c.emit.int32(0)]), x.bound, x.places)


def gate(c: Converter, node: ir.Node) -> None:
    """Tanh and Sigmoid."""
    x = _readable(c, node.inputs[0])
    op = f"Integer{node.op_type}"
    made = Wide(c.emit.put(op, [x.value], unit=2**x.places), GATE_PLACES, 2**GATE_PLACES)
    result = node.outputs[0]
    found = c.emit.rescaled(made, c.places(result), c.bound(result))
    c.put(node, found.value, found.bound)


def clip(c: Converter, node: ir.Node) -> None:
    """Clip at constants; an end beyond the grid is none."""
    x = c.wide(node.inputs[0])
    value = x.value
    for op, end in zip(("Max", "Min"), node.inputs[1:], strict=False):
        if end is None:
            continue
        array = constant_array(end)
        if array is None or not array.size == 1 or math.isnan(float(array.reshape(-1)[0])):
            raise Refused("it clips at computed numbers")
        at = float(array.reshape(-1)[0]) * 2.0**x.places
        if abs(at) <= x.bound:
            value = c.emit.put(op, [value, c.emit.int32(round(at))])
        elif (at > 0) == (op == "Max"):
            raise Refused("it clips at a number beyond anything that calibration saw")
    c.put(node, value, x.bound, x.places)


def clip_tokens(c: Converter, node: ir.Node) -> None:
    """Rows cut to a share of their own ends."""
    x = c.wide(node.inputs[0])
    reach = float(node.attributes["reach"].as_float())
    value = x.value
    for extreme, op in (("ReduceMax", "Min"), ("ReduceMin", "Max")):
        end = c.emit.put(extreme, [x.value, c.emit.int64s(-1)], keepdims=1)
        outside = c.emit.put("Max" if op == "Min" else "Min", [end, c.emit.int32(0)])
        value = c.emit.put(op, [value, c.emit.requantize(outside, x.bound, np.float64(reach), -x.bound, x.bound)])
    c.put(node, value, x.bound, x.places)


RULES: dict[str, Rule] = {
    "Div": divide,
    "Pow": power,
    "Neg": negate,
    "Where": choose,
    "Gelu": activation,
    "Silu": activation,
    "Relu": relu,
    "Tanh": gate,
    "Sigmoid": gate,
    "Clip": clip,
    "ClipTokens": clip_tokens,
}
