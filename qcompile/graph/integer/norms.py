"""RMSNorm and LayerNorm over the last axis."""

from __future__ import annotations

import numpy as np

from qcompile.graph.integer.parts import LAST, POWERS, constants, held, numbers, reached, rounded, wide_constants


def newton_root() -> str:
    """``root`` = floor(sqrt(v)), v int64 (..., 1) in 2^28..2^48 - 1: from above by Newton, then one comparison.

    The start is within 2^(1/4) of the root, so three steps leave an error below one.
    """
    marks = [int(np.ceil(2 ** (28 + i / 2))) for i in range(1, 40)]
    starts = [int(np.ceil(2 ** (14 + (i + 1) / 4))) for i in range(40)]
    text = f"""
        v_marks = Constant <value = {numbers(marks, "int64")}> ()
        v_starts = Constant <value = {numbers(starts, "int64")}> ()
        v_above = GreaterOrEqual (v, v_marks)
        v_ones = Cast <to = 6> (v_above)
        v_index = ReduceSum <keepdims = 1> (v_ones, last)
        k0 = Gather (v_starts, v_index)"""
    for i in range(3):
        text += f"""
        v_by{i} = Div (v, k{i})
        v_sum{i} = Add (k{i}, v_by{i})
        k{i + 1} = Div (v_sum{i}, two64)"""
    return (
        text
        + f"""{held("candidate", "k3", "root_low", "root_high")}
        v_square = Mul (candidate, candidate)
        v_over = Greater (v_square, v)
        v_excess = Cast <to = 7> (v_over)
        exact = Sub (candidate, v_excess)
        root = Max (exact, root_low)"""
    )


# x (..., C) int32 -> int32: ``rms_norm``
_RMS_NORM = f"""IntegerRMSNorm <epsilon> (x) => (y) {{
        wide_epsilon = Constant <value_int: int = @epsilon> (){LAST}{POWERS}
        {constants(two=2, lift=2**29, least=-(2**14), most=2**14)}
        {constants(below=-(2**15), above=2**15, low=-(2**26), high=2**26)}
        {wide_constants(one64=1, two64=2, guard=2**18, smallest=2**28, largest=2**48 - 1, root_low=2**14)}
        {wide_constants(root_high=2**24 - 1, unit=2**29, multiplier_high=2**15 - 1)}
        top = ReduceMax <keepdims = 1> (x, last)
        bottom = ReduceMin <keepdims = 1> (x, last)
        negated = Neg (bottom)
        size = Max (top, negated){reached("shift", "size", 14, 29)}
        p = Gather (powers, shift)
        {rounded("steps", "x", "p", "lift")}{held("short", "steps", "least", "most")}
        square = Mul (short, short)
        square64 = Cast <to = 7> (square)
        sum = ReduceSum <keepdims = 1> (square64, last)
        channels = Shape <start = -1> (x)
        n = Max (channels, one64)
        guarded = Mul (sum, guard)
        mean = Div (guarded, n)
        epsilons = Mul (wide_epsilon, guard)
        p64 = Cast <to = 7> (p)
        once = Div (epsilons, p64)
        twice = Div (once, p64)
        shifted = Add (mean, twice){held("v", "shifted", "smallest", "largest")}
        {newton_root()}
        {reached("octave", "root", 15, 23, "int64")}
        power = Gather (powers, octave)
        power64 = Cast <to = 7> (power)
        numerator = Mul (power64, unit)
        half_root = Div (root, two64)
        nearest = Add (numerator, half_root)
        reciprocal = Div (nearest, root)
        bounded = Min (reciprocal, multiplier_high)
        multiplier = Cast <to = 6> (bounded)
        whole = Mul (short, p)
        remainder = Sub (x, whole){held("rest", "remainder", "below", "above")}
        a = Mul (short, multiplier)
        b = Mul (rest, multiplier)
        carried = Div (b, p)
        scaled = Add (a, carried)
        {rounded("normal", "scaled", "power", "lift")}{held("y", "normal", "low", "high")}
    }}"""

# x (..., C) int32 -> int32: ``layer_norm``
_LAYER_NORM = f"""IntegerLayerNorm <epsilon> (x) => (y) {{{LAST}
        {wide_constants(one64=1, two=2, lift=2**28, low=-(2**28), high=2**28)}
        x64 = Cast <to = 7> (x)
        sum = ReduceSum <keepdims = 1> (x64, last)
        channels = Shape <start = -1> (x)
        n = Max (channels, one64)
        lifts = Mul (n, lift)
        {rounded("average", "sum", "n", "lifts")}{held("mean64", "average", "low", "high")}
        mean = Cast <to = 6> (mean64)
        centred = Sub (x, mean)
        y = qcompile.IntegerRMSNorm <epsilon: int = @epsilon> (centred)
    }}"""


BODIES = (_RMS_NORM, _LAYER_NORM)
