"""Grids that activations came with: a static QuantizeLinear/DequantizeLinear pair of the captured graph, which training
chose. ``quantise`` keeps them, and the passes before it see values that are rounded already."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array
from qcompile.graph.linears import VIEWS
from qcompile.quant.numerics import Affine

_SEEN_THROUGH = ("Reshape", "Flatten", *VIEWS)


def learned_grid(value: ir.Value) -> Affine | None:
    """The grid of one scale that ``value`` is on; None where it is a plain float value."""
    value = match.through(value, *_SEEN_THROUGH) or value
    dequantize = match.producer(value, "DequantizeLinear")
    quantize = None if dequantize is None else match.producer(dequantize.inputs[0], "QuantizeLinear")
    if dequantize is None or quantize is None or len(quantize.inputs) < 3 or len(dequantize.inputs) < 3:
        return None
    scale, zero = (constant_array(part) for part in quantize.inputs[1:3])
    back, origin = (constant_array(part) for part in dequantize.inputs[1:3])
    if scale is None or zero is None or back is None or origin is None:
        return None
    is_one_grid = np.array_equal(scale, back) and np.array_equal(zero, origin)
    if not is_one_grid or scale.size != 1 or zero.dtype != np.uint8:
        return None
    low, high = _codes(quantize.inputs[0], float(scale.item()), int(zero.item()))
    return Affine(scale.reshape(()), zero.reshape(()).astype(np.int32), low, high)


def bits_of(affine: Affine) -> int:
    """The bits that the codes of ``affine`` need."""
    return (affine.high - affine.low).bit_length()


def describe(affine: Affine) -> str:
    """As a scheme is described: ``uint4 per_tensor learned``."""
    return f"uint{bits_of(affine)} per_tensor static learned"


def _codes(value: ir.Value | None, scale: float, zero: int) -> tuple[int, int]:
    """The smallest and largest code that a Clip in front of QuantizeLinear leaves."""
    clip = match.producer(value, "Clip")
    low, high = 0, 255
    if clip is None:
        return low, high
    ends = [match.scalar(end) if end is not None else None for end in (*clip.inputs[1:3], None, None)[:2]]
    if ends[0] is not None:
        low = max(low, round(ends[0] / scale) + zero)
    if ends[1] is not None:
        high = min(high, round(ends[1] / scale) + zero)
    return low, high
