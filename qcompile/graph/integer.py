"""Bodies of the integer operators: standard int32 operators, int64 on per-token vectors and sums only.

``quant/integer.py`` says what each operator computes and for which inputs. A body holds every value by Max and Min
where it may multiply or divide, so that intervals alone, without relations between tensors, prove that nothing
overflows. Mod, Gather and BitShift by element are avoided: they cost ten times an addition in ONNX Runtime, while
GatherElements on flat tensors costs three.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

import numpy as np

from qcompile.quant.integer import (
    ATTENTION_FRACTION,
    DENT_FRACTION,
    DENT_STEPS,
    OCTAVE,
    REACH,
    SIGMOID_STEPS,
    dent_table,
    halvings,
    sigmoid_table,
)


def _list(values: Sequence[int] | np.ndarray, kind: str = "int32") -> str:
    return f"{kind}[{len(values)}] {{{', '.join(str(int(value)) for value in values)}}}"


def _attribute(*names: str) -> str:
    """int32 scalars from the attributes of the same names."""
    return "".join(
        f"""
        wide_{name} = Constant <value_int: int = @{name}> ()
        {name} = Cast <to = 6> (wide_{name})"""
        for name in names
    )


def _constants(**values: int) -> str:
    """int32 scalars."""
    return "".join(f"\n        {name} = Constant <value = int32 {{{value}}}> ()" for name, value in values.items())


def _wide_constants(**values: int) -> str:
    """int64 scalars."""
    return "".join(f"\n        {name} = Constant <value_int = {value}> ()" for name, value in values.items())


def _reached(out: str, vector: str, first: int, last: int, kind: str = "int32") -> str:
    """How many of 2^first .. 2^last are at most ``vector`` (..., 1): int32."""
    return f"""
        marks_{out} = Constant <value = {_list([2**i for i in range(first, last + 1)], kind)}> ()
        above_{out} = GreaterOrEqual ({vector}, marks_{out})
        ones_{out} = Cast <to = 6> (above_{out})
        {out} = ReduceSum <keepdims = 1> (ones_{out}, last)"""


def _held(out: str, value: str, low: str, high: str) -> str:
    """``value`` within the constants ``low`` and ``high``."""
    return f"""
        floored_{out} = Max ({value}, {low})
        {out} = Min (floored_{out}, {high})"""


def _looked_up(out: str, table: str, index: str, like: str) -> str:
    """``table[index]`` in the shape of ``like``; the index is flattened, because GatherElements is fast on one axis."""
    return f"""
        shape_{out} = Shape ({like})
        indices_{out} = Reshape ({index}, flat)
        entries_{out} = GatherElements <axis = 0> ({table}, indices_{out})
        {out} = Reshape (entries_{out}, shape_{out})"""


_LAST = "\n        last = Constant <value_ints = [-1]> ()"
_FLAT = "\n        flat = Constant <value_ints = [-1]> ()"
_POWERS = f"\n        powers = Constant <value = {_list([2**i for i in range(31)])}> ()"

# x int32, multiplier >= 0 and divisor int32, broadcast -> int32
_REQUANTIZE = f"""Requantize <low, high> (x, multiplier, divisor) => (y) {{
        {_attribute("low", "high")}{_constants(zero=0, two=2, lift=2**30, part=2**16, rest=2**16 - 1, share=2**14)}
        {_constants(most=2**29)}
        positive = Add (x, lift)
        top = Div (positive, part)
        whole = Mul (top, part)
        remainder = Sub (positive, whole){_held("bottom", "remainder", "zero", "rest")}
        a = Mul (top, multiplier)
        b = Mul (bottom, multiplier)
        carried = Div (b, part)
        product = Add (a, carried)
        lifted = Mul (multiplier, share)
        half = Div (divisor, two)
        less = Sub (half, lifted)
        offset = Add (less, most)
        moved = Add (product, offset)
        quotient = Div (moved, divisor)
        start = Div (most, divisor)
        rounded = Sub (quotient, start){_held("y", "rounded", "low", "high")}
    }}"""

# the same for multipliers of either sign
_REQUANTIZE_SIGNED = """RequantizeSigned <low, high> (x, multiplier, divisor) => (y) {
        sign = Sign (multiplier)
        size = Abs (multiplier)
        turned = Mul (x, sign)
        y = qcompile.Requantize <low: int = @low, high: int = @high> (turned, size, divisor)
    }"""

# a * b / (narrow * 2^16 * divisor)
_MULTIPLY_WIDE = f"""MultiplyWide <narrow, divisor, low, high> (a, b) => (y) {{
        {_attribute("narrow", "divisor")}{_constants(two=2, lift=2**29, least=-(2**15) + 1, most=2**15 - 1)}
        half = Div (narrow, two)
        offset = Add (half, lift)
        moved = Add (b, offset)
        steps = Div (moved, narrow)
        start = Div (lift, narrow)
        rounded = Sub (steps, start){_held("short", "rounded", "least", "most")}
        y = qcompile.RequantizeSigned <low: int = @low, high: int = @high> (a, short, divisor)
    }}"""

_RELU2 = f"""IntegerRelu2 <narrow, divisor, high> (x) => (y) {{
        {_constants(zero=0)}
        positive = Max (x, zero)
        y = qcompile.MultiplyWide <narrow: int = @narrow, divisor: int = @divisor, low = 0, high: int = @high> (positive, positive)
    }}"""


def _quantize(symmetric: bool) -> str:
    """The body that quantises rows of x (..., C) int32."""
    name = "QuantizePerTokenIntegerSymmetric" if symmetric else "QuantizePerTokenInteger"
    shared = f"""{name} <bits> (x) => (codes, zero, step, divisor) {{
        {_attribute("bits")}{_LAST}{_POWERS}
        {_constants(none=0, one=1, two=2, least=-(2**22) + 1, most=2**22 - 1, exponent=29 if symmetric else 30)}
        {_constants(longest=21, biggest=29)}{_wide_constants(first64=1, last64=2**15 - 1, fraction=2**8, middle=2**7)}
        top = ReduceMax <keepdims = 1> (x, last)
        bottom = ReduceMin <keepdims = 1> (x, last)
        hi = Max (top, none)
        lo = Min (bottom, none)"""
    if symmetric:
        ends = f"""
        grid_bits = Sub (bits, one)
        negated = Neg (lo)
        size = Max (hi, negated){_reached("shift", "size", 22, 28)}
        p = Gather (powers, shift)
        range = Div (size, p){_held("width", "range", "two", "most")}
        middle_code = Gather (powers, grid_bits)
        steps_of_all = Gather (powers, grid_bits)
        levels = Sub (steps_of_all, one)
        nothing = Mul (width, none)
        zero = Add (nothing, middle_code)
        low_code = Sub (middle_code, levels)
        high_code = Add (middle_code, levels)"""
    else:
        ends = f"""
        grid_bits = Identity (bits)
        size = Sub (hi, lo){_reached("shift", "size", 22, 29)}
        p = Gather (powers, shift)
        above = Div (hi, p)
        below = Div (lo, p)
        range = Sub (above, below){_held("width", "range", "two", "most")}
        steps_of_all = Gather (powers, grid_bits)
        levels = Sub (steps_of_all, one)
        half_width = Div (width, two)
        negated = Neg (below){_held("depth", "negated", "none", "most")}
        depths = Mul (depth, levels)
        rounding = Add (depths, half_width)
        ratio = Div (rounding, width)
        zero = Min (ratio, levels)
        low_code = Identity (none)
        high_code = Identity (levels)"""
    return f"""{shared}{ends}
        start = Mul (zero, width)
        half = Div (width, two)
        offset = Add (start, half)
        shifted = Div (x, p){_held("short", "shifted", "least", "most")}
        scaled = Mul (short, levels)
        moved = Add (scaled, offset)
        nearest = Div (moved, width){_held("code", "nearest", "low_code", "high_code")}
        codes = Cast <to = 2> (code)
        {_reached("octave", "width", 1, 21)}
        gap = Sub (longest, octave)
        factor = Gather (powers, gap)
        width64 = Cast <to = 7> (width)
        factor64 = Cast <to = 7> (factor)
        whole = Mul (width64, factor64)
        all64 = Cast <to = 7> (steps_of_all)
        levels64 = Cast <to = 7> (levels)
        numerator = Mul (whole, all64)
        half_step = Mul (levels64, middle)
        sum = Add (numerator, half_step)
        denominator = Mul (levels64, fraction)
        mantissa = Div (sum, denominator){_held("step64", "mantissa", "first64", "last64")}
        step = Cast <to = 6> (step64)
        less = Sub (exponent, octave)
        left = Sub (less, shift){_held("power", "left", "none", "biggest")}
        divisor = Gather (powers, power)
    }}"""


_RMS_NORM = f"""IntegerRMSNorm <epsilon> (x) => (y) {{
        wide_epsilon = Constant <value_int: int = @epsilon> (){_LAST}{_POWERS}
        {_constants(two=2, lift=2**29, least=-(2**14), most=2**14, below=-(2**15), above=2**15, low=-(2**26), high=2**26)}
        {_wide_constants(one64=1, two64=2, guard=2**18, smallest=2**28, largest=2**48 - 1, root_low=2**14)}
        {_wide_constants(root_high=2**24 - 1, unit=2**29, multiplier_high=2**15 - 1)}
        top = ReduceMax <keepdims = 1> (x, last)
        bottom = ReduceMin <keepdims = 1> (x, last)
        negated = Neg (bottom)
        size = Max (top, negated){_reached("shift", "size", 14, 29)}
        p = Gather (powers, shift)
        half = Div (p, two)
        offset = Add (half, lift)
        moved = Add (x, offset)
        steps = Div (moved, p)
        start = Div (lift, p)
        rounded = Sub (steps, start){_held("short", "rounded", "least", "most")}
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
        shifted = Add (mean, twice){_held("v", "shifted", "smallest", "largest")}
        $isqrt
        {_reached("octave", "root", 15, 23, "int64")}
        power = Gather (powers, octave)
        power64 = Cast <to = 7> (power)
        numerator = Mul (power64, unit)
        half_root = Div (root, two64)
        nearest = Add (numerator, half_root)
        reciprocal = Div (nearest, root)
        bounded = Min (reciprocal, multiplier_high)
        multiplier = Cast <to = 6> (bounded)
        whole = Mul (short, p)
        remainder = Sub (x, whole){_held("rest", "remainder", "below", "above")}
        a = Mul (short, multiplier)
        b = Mul (rest, multiplier)
        carried = Div (b, p)
        half_power = Div (power, two)
        rounding = Add (half_power, lift)
        begun = Add (a, rounding)
        scaled = Add (begun, carried)
        quotient = Div (scaled, power)
        zero_point = Div (lift, power)
        normal = Sub (quotient, zero_point){_held("y", "normal", "low", "high")}
    }}"""

_LAYER_NORM = f"""IntegerLayerNorm <epsilon> (x) => (y) {{{_LAST}
        {_wide_constants(one64=1, two64=2, lift=2**28, low=-(2**28), high=2**28)}
        x64 = Cast <to = 7> (x)
        sum = ReduceSum <keepdims = 1> (x64, last)
        channels = Shape <start = -1> (x)
        n = Max (channels, one64)
        lifts = Mul (n, lift)
        half = Div (n, two64)
        offset = Add (lifts, half)
        moved = Add (sum, offset)
        quotient = Div (moved, n)
        rounded = Sub (quotient, lift){_held("mean64", "rounded", "low", "high")}
        mean = Cast <to = 6> (mean64)
        centred = Sub (x, mean)
        y = qcompile.IntegerRMSNorm <epsilon: int = @epsilon> (centred)
    }}"""


def _isqrt() -> str:
    """``root`` = floor(sqrt(v)), v int64 (..., 1) in 2^28..2^48 - 1: from above by Newton, then one comparison.

    The start is within 2^(1/4) of the root, so three steps leave an error below one.
    """
    marks = [int(np.ceil(2 ** (28 + i / 2))) for i in range(1, 40)]
    starts = [int(np.ceil(2 ** (14 + (i + 1) / 4))) for i in range(40)]
    text = f"""
        v_marks = Constant <value = {_list(marks, "int64")}> ()
        v_starts = Constant <value = {_list(starts, "int64")}> ()
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
        + f"""{_held("candidate", "k3", "root_low", "root_high")}
        v_square = Mul (candidate, candidate)
        v_over = Greater (v_square, v)
        v_excess = Cast <to = 7> (v_over)
        exact = Sub (candidate, v_excess)
        root = Max (exact, root_low)"""
    )


def _softmax_index(bits: int) -> str:
    """``index`` into the table of ``halvings(bits)``."""
    cap, count = (bits + 1) * 2**16 - 1, (bits + 1) * OCTAVE
    return f"""
        {_attribute("lift")}{_LAST}{_FLAT}
        {_constants(zero=0, one=1, nowhere=-(2**30), anything=2**30, lowest=-(2**29), octave=OCTAVE, reach=cap, end=count, shortest=2**13)}
        allowed = Where (mask, anything, nowhere)
        held = Min (scores, allowed)
        peak = ReduceMax <keepdims = 1> (held, last)
        top = Max (peak, lowest)
        far = Add (reach, lift)
        cap = Div (far, lift)
        steps = Mul (lift, octave)
        distance = Sub (top, held){_held("below", "distance", "zero", "cap")}
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

_SOFTMAX = f"""IntegerSoftmax <lift> (scores, mask, period) => (weights, total) {{{_softmax_index(8)}
        table = Constant <value = $halvings8> (){_looked_up("weights", "table", "index", "scores")}{_ONES}{_row_sums("sum", "weights")}
        total = Max (sum, one)
    }}"""

_SOFTMAX16 = f"""IntegerSoftmax16 <lift> (scores, mask, period) => (high, low, total) {{{_softmax_index(16)}
        {_constants(byte=256)}
        high_table = Constant <value = $halvings16_high> ()
        low_table = Constant <value = $halvings16_low> (){_looked_up("high", "high_table", "index", "scores")}
        {_looked_up("low", "low_table", "index", "scores")}{_ONES}
        {_row_sums("high_sum", "high")}{_row_sums("low_sum", "low")}
        high_part = Mul (high_sum, byte)
        sum = Add (high_part, low_sum)
        total = Max (sum, one)
    }}"""

_TOTAL_MAX = 255 * 32768
_NORMALIZE = f"""NormalizeAttention (sums, total) => (y) {{
        {_constants(one=1, two=2, low=-128, high=128, unit=2**ATTENTION_FRACTION, most=_TOTAL_MAX, least=-_TOTAL_MAX)}
        {_held("count", "total", "one", "most")}
        ratio = Div (sums, count){_held("whole", "ratio", "low", "high")}
        taken = Mul (whole, count)
        remainder = Sub (sums, taken){_held("rest", "remainder", "least", "most")}
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

_NORMALIZE16 = f"""NormalizeAttention16 <lift> (high, low, total) => (y) {{
        {_attribute("lift")}{_LAST}{_POWERS}{_constants(least=2**15, one=1, nine=9)}
        {_wide_constants(two64=2, unit=2**30, most=2**15 - 1)}
        count = Max (total, least){_reached("octave", "count", 16, 30)}
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

_ROTARY = f"""IntegerRotaryEmbedding (x, cos, sin) => (y) {{
        {_constants(half=2**13, unit=2**14)}
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


def _sigmoid(name: str, table: str, halved: bool = False) -> str:
    """The nearest entry of a table of ``sigmoid_table``: Q15."""
    unit = "\n        narrow = Div (unit, two)" if halved else "\n        narrow = Identity (unit)"
    return f"""{name} <unit> (x) => (y) {{
        {_attribute("unit")}{_FLAT}{_constants(two=2, reach=REACH, steps=SIGMOID_STEPS)}
        table = Constant <value = ${table}> (){unit}
        step = Div (narrow, steps)
        limit = Mul (narrow, reach)
        lowest = Neg (limit)
        half = Div (step, two)
        offset = Add (limit, half){_held("held", "x", "lowest", "limit")}
        moved = Add (held, offset)
        index = Div (moved, step){_looked_up("y", "table", "index", "x")}
    }}"""


def _activation(name: str, table: str) -> str:
    """max(x, 0) less the nearest entry of a table of ``dent_table``; on the grid of x."""
    return f"""{name} <unit> (x) => (y) {{
        {_attribute("unit")}{_FLAT}
        {_constants(zero=0, one=1, two=2, reach=REACH, steps=DENT_STEPS, fraction=2**DENT_FRACTION)}
        table = Constant <value = ${table}> ()
        step = Div (unit, steps)
        limit = Mul (unit, reach)
        half = Div (step, two)
        size = Abs (x){_held("held", "size", "zero", "limit")}
        moved = Add (held, half)
        index = Div (moved, step){_looked_up("dent", "table", "index", "x")}
        more = Div (unit, fraction)
        up = Max (more, one)
        less = Div (fraction, unit)
        down = Max (less, one)
        half_down = Div (down, two)
        scaled = Mul (dent, up)
        rounding = Add (scaled, half_down)
        depth = Div (rounding, down)
        positive = Max (x, zero)
        y = Sub (positive, depth)
    }}"""


_BODIES = (
    _REQUANTIZE, _REQUANTIZE_SIGNED, _MULTIPLY_WIDE, _RELU2, _quantize(symmetric=False), _quantize(symmetric=True),
    _RMS_NORM, _LAYER_NORM, _SOFTMAX, _SOFTMAX16, _NORMALIZE, _NORMALIZE16, _ROTARY,
    _sigmoid("IntegerSigmoid", "sigmoid"), _sigmoid("IntegerTanh", "tanh", halved=True),
    _activation("IntegerSilu", "silu"), _activation("IntegerGelu", "gelu"),
    _activation("IntegerGeluTanh", "gelu_tanh"),
)  # fmt: skip
BODIES = {text.split(maxsplit=1)[0]: text for text in _BODIES}

_PARTS: dict[str, Callable[[], str]] = {
    "isqrt": _isqrt,
    "halvings8": lambda: _list(halvings(8), "uint8"),
    "halvings16_high": lambda: _list(halvings(16) // 256, "uint8"),
    "halvings16_low": lambda: _list(halvings(16) % 256, "uint8"),
    "sigmoid": lambda: _list(sigmoid_table("sigmoid")),
    "tanh": lambda: _list(sigmoid_table("tanh")),
    "silu": lambda: _list(dent_table("silu")),
    "gelu": lambda: _list(dent_table("gelu")),
    "gelu_tanh": lambda: _list(dent_table("gelu_tanh")),
}


def body(name: str) -> str:
    """The text of the function ``name``, its tables written out."""
    text = BODIES[name]
    wanted = re.findall(r"\$(\w+)", text)
    return string.Template(text).substitute({key: _PARTS[key]() for key in wanted})
