"""Attention in integers: 8-bit queries, keys and values, and weights that are normalised after the last product.

Keys are stored about the middle of each channel's range, which adds the same number to all scores of a query, and
a softmax does not see it; values too, which comes back as a constant, since weights sum to one. What is left is
scaled channel by channel, keys down and queries up, until both use their codes about equally (the smoothing of
arXiv 2405.17849 after the rotary embedding, where it is an equivalence for any scales).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.integer import masks
from qcompile.integer.convert import Converter, Refused
from qcompile.integer.emit import LIMIT
from qcompile.integer.values import Wide
from qcompile.quant.integer import ATTENTION16_FRACTION, ATTENTION_FRACTION

U8, I8, I32, BOOL = ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.BOOL
TOP = 127
MIDDLE = 128
BALANCE = 0.5  # the share of a key channel's size that moves to the query's
TINY = 1e-9
PERIOD_BITS = 13  # of the smallest period: ln 2 in units of the scores
ALIKE = 4.0  # times that heads may differ in the unit of their scores: the periods of all fit 16 bits
MOST_PERIOD = 2**16 - 1
MOST_BIAS = 2**28  # of scores
MOST_LIFT = 19  # bits of the periods
BYTE = 256
VALUE_HEADROOM = 2.0  # of 16-bit values: times what calibration saw
MOST_FINE_KEYS = 2**14  # that values of 16 bits add up over


def attention(c: Converter, node: ir.Node) -> None:
    """Attention{scale} or GroupedAttention{scale, groups} over (B, H, S, d)."""
    q, k, v = (c.wide(value) for value in node.inputs[:3])
    groups = match.int_attribute(node, "groups", 1)
    heads, widths = _layout(node.inputs[1]), tuple(_layout(value, 3) for value in node.inputs[1:3])
    if heads is None or None in widths:
        raise Refused("the number of heads or their width is not known")
    given = node.inputs[3] if len(node.inputs) > 3 else None
    try:
        mask, bias = masks.split(given, c.emit) if given is not None else (masks.all_true(c.emit), None)
    except masks.NoFlags as error:
        raise Refused(str(error)) from error
    if groups > 1 and _per_head(mask):
        raise Refused("each head has a mask of its own, and heads are grouped")
    if groups > 1 and isinstance(bias, masks.Slopes):
        raise Refused("a bias that depends on positions, and heads are grouped")
    made = _Attention(c, node, heads, groups, (int(widths[0]), int(widths[1])))  # type: ignore[arg-type]
    c.put(node, made.write(q, k, v, mask, bias), c.bound(node.outputs[0]))


def _layout(value: ir.Value | None, axis: int = 1) -> int | None:
    size = value.shape[axis] if value is not None and value.shape is not None and len(value.shape) == 4 else None
    return size if isinstance(size, int) else None


def _per_head(mask: ir.Value) -> bool:
    """Whether the mask is not known to be the same for all heads."""
    return mask.shape is None or (len(mask.shape) > 2 and mask.shape[-3] != 1)


class _Attention:
    """``heads``: of keys and values; each serves ``groups`` heads of queries; ``widths``: of keys and of values."""

    def __init__(self, c: Converter, node: ir.Node, heads: int, groups: int, widths: tuple[int, int]) -> None:
        self.c, self.emit, self.node = c, c.emit, node
        self.heads, self.groups, self.widths = heads, groups, widths

    def write(self, q: Wide, k: Wide, v: Wide, mask: ir.Value, bias: np.ndarray | masks.Slopes | None) -> ir.Value:
        emit = self.emit
        (_, q_reach), (k_middle, k_reach), (v_middle, v_reach) = (self._extremes(i) for i in range(3))
        q_reach = q_reach.reshape(self.heads, self.groups, self.widths[0])  # heads of keys, their queries, channels
        together = np.maximum(q_reach.max(axis=1), TINY)
        share = k_reach**BALANCE / together ** (1 - BALANCE)  # (heads, width): keys are divided by it
        k_step = (k_reach / share).max(axis=1) / TOP
        q_step = (q_reach * share[:, None]).max(axis=(1, 2)) / TOP
        scale = float(self.node.attributes["scale"].as_float())
        unit = q_step * k_step * scale  # of the scores, by head: one lift serves all
        unit = np.maximum(unit, max(unit.max() / ALIKE, np.log(2) / MOST_PERIOD))
        q_step = unit / (k_step * scale)
        keys = emit.cast(self._codes(k, k_middle, 1 / (share * k_step[:, None]), TOP), I8)
        values, v_step = self._value_codes(v, v_middle, v_reach)
        per_query = np.repeat(share / q_step[:, None], self.groups, axis=0)
        steps = emit.requantize(q.value, q.bound, self._shaped(per_query) * 2.0**-q.places, -TOP, TOP)
        queries = self._split(emit.cast(emit.put("Add", [steps, emit.int32(MIDDLE)]), U8), U8)
        turned = emit.put("Transpose", [keys], I8, perm=[0, 1, 3, 2])
        scores = self._product(queries, self._beside(turned, I8), MIDDLE)
        if bias is not None:
            steps = self._bias(bias, unit) if isinstance(bias, np.ndarray) else self._sloped(bias, unit)
            scores = self.emit.put("Add", [scores, steps])
        parts, total = self._weights(scores, self._spread(mask), np.log(2) / unit)
        mixed, unit_places = self._mean(parts, [self._beside(part, I8) for part in values], total)
        places, bound = self.c.places(self.node.outputs[0]), self.c.bound(self.node.outputs[0])
        most = (TOP + 1) << unit_places
        mixed = emit.clip(mixed, -most, most)
        each = np.repeat(v_step, self.groups, axis=0) * 2.0 ** (places - unit_places)
        result = emit.requantize(self._joined(mixed), most, self._shaped(each), -bound, bound)
        offset = np.rint(np.repeat(v_middle, self.groups, axis=0) * 2.0**places).astype(np.int32)
        return emit.clip(emit.put("Add", [result, emit.int32(self._shaped(offset))]), -bound, bound)

    def _extremes(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, d): the middle of each channel of an operand (0 for queries), and how far it reaches from there."""
        value = self.node.inputs[index]
        lo, hi = (end.astype(np.float64) for end in self.c.grids.extremes[str(value.name)])  # type: ignore[union-attr]
        if index == 0:
            return np.zeros_like(lo), np.maximum(np.maximum(-lo, hi), TINY)
        return (lo + hi) / 2, np.maximum((hi - lo) / 2, TINY)

    def _shaped(self, array: np.ndarray) -> np.ndarray:
        """(H, d) -> (1, H, 1, d)"""
        return array[None, :, None]

    def _codes(self, x: Wide, middle: np.ndarray, scale: np.ndarray, most: int) -> ir.Value:
        """int32 (B, heads, S, d): round((x - middle) * scale), at most ``most`` in size."""
        centre = np.rint(self._shaped(middle) * 2.0**x.places).astype(np.int32)
        centred = self.emit.put("Sub", [x.value, self.emit.int32(centre)])
        bound = x.bound + int(np.abs(centre).max())
        return self.emit.requantize(centred, bound, self._shaped(scale) * 2.0**-x.places, -most, most)

    def _value_codes(self, v: Wide, middle: np.ndarray, reach: np.ndarray) -> tuple[list[ir.Value], np.ndarray]:
        """int8 codes of the values, with 16-bit weights their high and low bytes; and a high step (H, d)."""
        emit = self.emit
        if self.c.settings.probability_bits == 8 or self.c.keys > MOST_FINE_KEYS:
            return [emit.cast(self._codes(v, middle, TOP / reach, TOP), I8)], reach / TOP
        step = VALUE_HEADROOM * reach / TOP
        both = self._codes(v, middle, BYTE / step, TOP * BYTE)
        return emit.put_all("SplitBytes", [both], [I8, I8]), step

    def _split(self, x: ir.Value, kind: ir.DataType) -> ir.Value:
        """(B, H, S, n) -> (B, heads, groups, S, n)"""
        shape = self.emit.int64s(0, self.heads, self.groups, -1, self.widths[0])
        return self.emit.put("Reshape", [x, shape], kind) if self.groups > 1 else x

    def _beside(self, x: ir.Value, kind: ir.DataType) -> ir.Value:
        """(B, heads, S, n) -> (B, heads, 1, S, n)"""
        return self.emit.put("Unsqueeze", [x, self.emit.int64s(2)], kind) if self.groups > 1 else x

    def _spread(self, mask: ir.Value) -> ir.Value:
        """A mask for all heads -> (B, 1, 1, S, n), or of fewer axes."""
        return self._beside(mask, BOOL) if mask.shape is not None and len(mask.shape) == 4 else mask

    def _bias(self, bias: np.ndarray, unit: np.ndarray) -> ir.Value:
        """A constant that is added to the scores, in their units."""
        shape = (1,) * (4 - bias.ndim) + bias.shape
        each = np.repeat(unit, self.groups)[:, None, None]
        steps = np.rint(bias.reshape(shape).astype(np.float64) / each)
        if not np.abs(steps).max() < MOST_BIAS:
            raise Refused("the bias of its scores is too large")
        if self.groups > 1:
            steps = steps.reshape(shape[0], self.heads, self.groups, *shape[2:])
        return self.emit.int32(steps.astype(np.int32), "bias")

    def _sloped(self, bias: masks.Slopes, unit: np.ndarray) -> ir.Value:
        """Integers, at most as many as there are keys, times constants, in units of the scores."""
        most = self.c.keys
        factor = bias.factor.astype(np.float64) / unit[:, None, None]
        if not np.abs(factor).max() * most < MOST_BIAS:
            raise Refused("the bias of its scores is too large")
        ends = [self.emit.constant(np.asarray(end, np.int64), "end") for end in (-most, most)]
        floored = self.emit.put("Max", [bias.integers, ends[0]], ir.DataType.INT64)
        inside = self.emit.cast(self.emit.put("Min", [floored, ends[1]], ir.DataType.INT64), I32)
        return self.emit.requantize(inside, most, factor, -MOST_BIAS, MOST_BIAS)

    def _joined(self, x: ir.Value) -> ir.Value:
        """(B, heads, groups, S, d) -> (B, H, S, d)"""
        shape = self.emit.int64s(0, self.heads * self.groups, -1, self.widths[1])
        return self.emit.put("Reshape", [x, shape]) if self.groups > 1 else x

    def _product(self, left: ir.Value, right: ir.Value, zero: int) -> ir.Value:
        return self.emit.put("MatMulInteger", [left, right, self.emit.constant(np.asarray(zero, np.uint8), "zero")])

    def _weights(self, scores: ir.Value, mask: ir.Value, period: np.ndarray) -> tuple[Sequence[ir.Value], ir.Value]:
        """Codes of the softmax (two bytes each where they have 16 bits) and their sum; period (heads,)."""
        lift = max(0, PERIOD_BITS - math.floor(math.log2(float(period.min()))))
        if lift > MOST_LIFT:
            raise Refused("its scores are too steep for a softmax in integers")
        units = np.minimum(np.rint(period * 2.0**lift), MOST_PERIOD).astype(np.int32)
        units = units.reshape(1, -1, *(1 for _ in range(2 if self.groups == 1 else 3)))
        inputs = [scores, mask, self.emit.int32(units)]
        if self.c.settings.probability_bits == 8:
            found = self.emit.put_all("IntegerSoftmax", inputs, [U8, I32], lift=2**lift)
        else:
            found = self.emit.put_all("IntegerSoftmax16", inputs, [U8, U8, I32], lift=2**lift)
        return found[:-1], found[-1]

    def _mean(
        self, weights: Sequence[ir.Value], values: Sequence[ir.Value], total: ir.Value
    ) -> tuple[ir.Value, int]:
        """The mean of the values in high steps, and its places: bytes times bytes, but for the low ones of both."""
        sums = [self._product(part, values[0], 0) for part in weights]
        if len(weights) == 1:
            return self.emit.put("NormalizeAttention", [*sums, total]), ATTENTION_FRACTION
        if len(values) > 1:
            sums[1] = self.emit.put("Add", [sums[1], self._product(weights[0], values[1], 0)])
        free = LIMIT // (255 * (TOP if len(values) == 1 else TOP + MIDDLE) * self.c.keys)
        lift = max(0, free.bit_length() - 1)
        mixed = self.emit.put("NormalizeAttention16", [*sums, total], lift=2**lift)
        return mixed, ATTENTION16_FRACTION + lift
