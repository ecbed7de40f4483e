"""To another grid: requantisation, products, and codes of tokens."""

from __future__ import annotations

from qcompile.graph.integer.parts import LAST, POWERS, attribute, constants, held, reached, rounded, wide_constants

# x int32; multiplier >= 0 and divisor int32 scalars, per column or (..., 1) -> int32: ``requantize``
_REQUANTIZE = f"""Requantize <low, high> (x, multiplier, divisor) => (y) {{
        {attribute("low", "high")}{constants(zero=0, two=2, lift=2**30, part=2**16, rest=2**16 - 1, share=2**14)}
        {constants(most=2**29)}
        positive = Add (x, lift)
        top = Div (positive, part)
        whole = Mul (top, part)
        remainder = Sub (positive, whole){held("bottom", "remainder", "zero", "rest")}
        a = Mul (top, multiplier)
        b = Mul (bottom, multiplier)
        carried = Div (b, part)
        product = Add (a, carried)
        lifted = Mul (multiplier, share)
        {rounded("nearest", "product", "divisor", "most", less="lifted")}{held("y", "nearest", "low", "high")}
    }}"""

# the same for multipliers of either sign
_REQUANTIZE_SIGNED = """RequantizeSigned <low, high> (x, multiplier, divisor) => (y) {
        sign = Sign (multiplier)
        size = Abs (multiplier)
        turned = Mul (x, sign)
        y = qcompile.Requantize <low: int = @low, high: int = @high> (turned, size, divisor)
    }"""

# a, b int32 -> int32: ``multiply_wide``
_MULTIPLY_WIDE = f"""MultiplyWide <narrow, divisor, low, high> (a, b) => (y) {{
        {attribute("narrow", "divisor")}{constants(two=2, lift=2**29, least=-(2**15) + 1, most=2**15 - 1)}
        {rounded("nearest", "b", "narrow", "lift")}{held("short", "nearest", "least", "most")}
        y = qcompile.RequantizeSigned <low: int = @low, high: int = @high> (a, short, divisor)
    }}"""

# x int32 -> int32: ``relu_squared``
_RELU2 = f"""IntegerRelu2 <narrow, divisor, high> (x) => (y) {{
        {constants(zero=0)}
        positive = Max (x, zero)
        y = qcompile.MultiplyWide <narrow: int = @narrow, divisor: int = @divisor, low = 0, high: int = @high> (
            positive, positive
        )
    }}"""


# x int32 -> int8, int8: ``split_bytes``
_SPLIT = f"""SplitBytes (x) => (high, low) {{
        {constants(two=2, byte=2**8, lift=2**29, least=-127, most=127, lowest=-128)}
        {rounded("nearest", "x", "byte", "lift")}{held("whole", "nearest", "least", "most")}
        taken = Mul (whole, byte)
        remainder = Sub (x, taken){held("rest", "remainder", "lowest", "most")}
        high = Cast <to = 3> (whole)
        low = Cast <to = 3> (rest)
    }}"""


def _quantize(symmetric: bool) -> str:
    """x (..., C) int32 -> uint8 codes, and zero, step, divisor int32 (..., 1): ``quantize_per_token``."""
    name = "QuantizePerTokenIntegerSymmetric" if symmetric else "QuantizePerTokenInteger"
    shared = f"""{name} <bits> (x) => (codes, zero, step, divisor) {{
        {attribute("bits")}{LAST}{POWERS}
        {constants(none=0, one=1, two=2, least=-(2**22) + 1, most=2**22 - 1, exponent=29 if symmetric else 30)}
        {constants(longest=21, biggest=29)}{wide_constants(first64=1, last64=2**15 - 1, fraction=2**8, middle=2**7)}
        top = ReduceMax <keepdims = 1> (x, last)
        bottom = ReduceMin <keepdims = 1> (x, last)
        hi = Max (top, none)
        lo = Min (bottom, none)"""
    if symmetric:
        ends = f"""
        grid_bits = Sub (bits, one)
        negated = Neg (lo)
        size = Max (hi, negated){reached("shift", "size", 22, 28)}
        p = Gather (powers, shift)
        range = Div (size, p){held("width", "range", "two", "most")}
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
        size = Sub (hi, lo){reached("shift", "size", 22, 29)}
        p = Gather (powers, shift)
        above = Div (hi, p)
        below = Div (lo, p)
        range = Sub (above, below){held("width", "range", "two", "most")}
        steps_of_all = Gather (powers, grid_bits)
        levels = Sub (steps_of_all, one)
        half_width = Div (width, two)
        negated = Neg (below){held("depth", "negated", "none", "most")}
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
        shifted = Div (x, p){held("short", "shifted", "least", "most")}
        scaled = Mul (short, levels)
        moved = Add (scaled, offset)
        nearest = Div (moved, width){held("code", "nearest", "low_code", "high_code")}
        codes = Cast <to = 2> (code)
        {reached("octave", "width", 1, 21)}
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
        mantissa = Div (sum, denominator){held("step64", "mantissa", "first64", "last64")}
        step = Cast <to = 6> (step64)
        less = Sub (exponent, octave)
        left = Sub (less, shift){held("power", "left", "none", "biggest")}
        divisor = Gather (powers, power)
    }}"""


def _rescale(name: str, cast: str, turned: bool) -> str:
    """x, before, lift, multiplier, divisor, after int32 that broadcast -> int32, uint8 or int8: ``rescale``.

    ``turned``: of x (B, n, m, d) as (B, m, n, d).
    """
    first = "Transpose <perm = [0, 2, 1, 3]> (x)" if turned else "Identity (x)"
    return f"""{name}{"Turned" if turned else ""} <floor, ceiling, low, high, least, most> (
        x, before, lift, multiplier, divisor, after
    ) => (y) {{
        {attribute("floor", "ceiling", "least", "most")}{constants(reach=2**30 - 1)}
        given = {first}
        begun = Add (given, before){held("kept", "begun", "floor", "ceiling")}
        top = Div (reach, lift)
        bottom = Neg (top){held("inside", "kept", "bottom", "top")}
        lifted = Mul (inside, lift)
        scaled = qcompile.RequantizeSigned <low: int = @low, high: int = @high> (lifted, multiplier, divisor)
        ended = Add (scaled, after){held("result", "ended", "least", "most")}
        y = {cast} (result)
    }}"""


_CASTS = {"Rescale": "Identity", "RescaleToUint8": "Cast <to = 2>", "RescaleToInt8": "Cast <to = 3>"}

BODIES = (
    _REQUANTIZE,
    _REQUANTIZE_SIGNED,
    _MULTIPLY_WIDE,
    _RELU2,
    _SPLIT,
    _quantize(symmetric=False),
    _quantize(symmetric=True),
    *(_rescale(name, cast, turned) for name, cast in _CASTS.items() for turned in (False, True)),
)
