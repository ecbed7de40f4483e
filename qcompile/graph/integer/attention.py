"""Softmax with deferred normalisation, and rotary embedding."""

from __future__ import annotations

from qcompile.graph.integer.parts import (
    FLAT,
    LAST,
    POWERS,
    attribute,
    constants,
    held,
    looked_up,
    reached,
    wide_constants,
)
from qcompile.quant.integer import ATTENTION_FRACTION, OCTAVE


def _softmax_index(bits: int) -> str:
    """``index`` into the table of ``halvings(bits)``."""
    cap, count = (bits + 1) * 2**16 - 1, (bits + 1) * OCTAVE
    return f"""
        {attribute("lift")}{LAST}{FLAT}
        {constants(zero=0, one=1, nowhere=-(2**30), anything=2**30, lowest=-(2**29))}
        {constants(octave=OCTAVE, reach=cap, end=count, shortest=2**13)}
        allowed = Where (mask, anything, nowhere)
        held = Min (scores, allowed)
        peak = ReduceMax <keepdims = 1> (held, last)
        top = Max (peak, lowest)
        far = Add (reach, lift)
        cap = Div (far, lift)
        steps = Mul (lift, octave)
        distance = Sub (top, held){held("below", "distance", "zero", "cap")}
        lifted = Mul (below, steps)
        longest = Max (period, shortest)
        place = Div (lifted, longest)
        index = Min (place, end)"""


def _row_sums(out: str, weights: str) -> str:
    """int32 sums of uint8 rows: a product with ones is the fastest that ONNX Runtime has."""
    return f"""
        {out} = MatMulInteger ({weights}, ones)"""


_ONES = """
        columns = Shape <start = -1> (scores)
        single = Constant <value_ints = [1]> ()
        pair = Concat <axis = 0> (columns, single)
        ones = ConstantOfShape <value = int8[1] {1}> (pair)"""

# scores (..., S, T) int32, mask bool, period int32 -> uint8 weights, total int32 (..., S, 1): ``softmax_weights``
_SOFTMAX = f"""IntegerSoftmax <lift> (scores, mask, period) => (weights, total) {{{_softmax_index(8)}
        table = Constant <value = $halvings8> (){looked_up("weights", "table", "index", "scores")}
        {_ONES}{_row_sums("sum", "weights")}
        total = Max (sum, one)
    }}"""

# the same with 16-bit weights, as their high and low bytes
_SOFTMAX16 = f"""IntegerSoftmax16 <lift> (scores, mask, period) => (high, low, total) {{{_softmax_index(16)}
        {constants(byte=256)}
        high_table = Constant <value = $halvings16_high> ()
        low_table = Constant <value = $halvings16_low> (){looked_up("high", "high_table", "index", "scores")}
        {looked_up("low", "low_table", "index", "scores")}{_ONES}
        {_row_sums("high_sum", "high")}{_row_sums("low_sum", "low")}
        high_part = Mul (high_sum, byte)
        sum = Add (high_part, low_sum)
        total = Max (sum, one)
    }}"""

_TOTAL_MAX = 255 * 32768
# sums (..., S, d), total (..., S, 1) int32 -> int32: ``normalize_attention``
_NORMALIZE = f"""NormalizeAttention (sums, total) => (y) {{
        {constants(one=1, two=2, low=-128, high=128, unit=2**ATTENTION_FRACTION, most=_TOTAL_MAX, least=-_TOTAL_MAX)}
        {held("count", "total", "one", "most")}
        ratio = Div (sums, count){held("whole", "ratio", "low", "high")}
        taken = Mul (whole, count)
        remainder = Sub (sums, taken){held("rest", "remainder", "least", "most")}
        fine = Mul (rest, unit)
        lift = Mul (count, unit)
        half = Div (count, two)
        offset = Add (lift, half)
        moved = Add (fine, offset)
        quotient = Div (moved, count)
        fraction = Sub (quotient, unit)
        wholes = Mul (whole, unit)
        y = Add (wholes, fraction)
    }}"""

# high, low (..., S, d), total (..., S, 1) int32 -> int32: ``normalize_attention16``
_NORMALIZE16 = f"""NormalizeAttention16 <lift> (high, low, total) => (y) {{
        {attribute("lift")}{LAST}{POWERS}{constants(least=2**15, one=1, nine=9)}
        {wide_constants(two64=2, unit=2**30, most=2**15 - 1)}
        count = Max (total, least){reached("octave", "count", 16, 30)}
        count64 = Cast <to = 7> (count)
        power = Gather (powers, octave)
        power64 = Cast <to = 7> (power)
        numerator = Mul (power64, unit)
        half = Div (count64, two64)
        rounding = Add (numerator, half)
        reciprocal = Div (rounding, count64)
        bounded = Min (reciprocal, most)
        multiplier = Cast <to = 6> (bounded)
        high_power = Add (octave, one)
        low_power = Add (octave, nine)
        high_divisor = Gather (powers, high_power)
        low_divisor = Gather (powers, low_power)
        high_lifted = Mul (high, lift)
        low_lifted = Mul (low, lift)
        a = qcompile.Requantize <low = -536870912, high = 536870912> (high_lifted, multiplier, high_divisor)
        b = qcompile.Requantize <low = -536870912, high = 536870912> (low_lifted, multiplier, low_divisor)
        y = Add (a, b)
    }}"""

# x (B, H, S, d), cos, sin int32 broadcast to it -> int32: ``rotary_embedding``
_ROTARY = f"""IntegerRotaryEmbedding (x, cos, sin) => (y) {{
        {constants(half=2**13, unit=2**14)}
        first, second = Split <axis = -1, num_outputs = 2> (x)
        negated = Neg (second)
        rotated = Concat <axis = -1> (negated, first)
        a = Mul (x, cos)
        b = Mul (rotated, sin)
        sum = Add (a, b)
        sign = Sign (sum)
        halves = Mul (sign, half)
        away = Add (sum, halves)
        y = Div (away, unit)
    }}"""

BODIES = (_SOFTMAX, _SOFTMAX16, _NORMALIZE, _NORMALIZE16, _ROTARY)
