"""Integer operators: what each one computes, in NumPy; beside ``numerics.py`` the only file that rounds.

A *wide* value is int32 on a static grid, codes are uint8. What varies by token is an int32 vector (..., 1): a
mantissa below 2^15 and a divisor, a power of two. Every function returns exactly what the ONNX function of the
same operator (``graph/integer.py``) returns, and a kernel must return the same; int64 here is only shorthand
for the splits there. Division rounds down unless a comment says otherwise.
Sources: I-LLM (arXiv 2405.17849) for the operators; the deviations are guard bits, exact products and tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from qcompile.errors import UserError

Array = np.ndarray

MULTIPLIER_BITS = 15
MAX_DIVISOR = 2**29
OCTAVE = 1024  # entries of the tables of 2^-x for each halving
REACH = 11  # beyond it a sigmoid is 0 or 1 to half a unit of Q15
SIGMOID_STEPS = 1024  # entries of the tables of sigmoid and tanh for each 1.0 of their argument
DENT_STEPS = 2048  # entries of the tables of activations
DENT_FRACTION = 16  # bits of their entries
ATTENTION_FRACTION = 7
ATTENTION16_FRACTION = 5
_ROPE_FRACTION = 14


def _int64(x: ArrayLike) -> Array:
    return np.asarray(x).astype(np.int64)


def _int32(x: Array) -> Array:
    return x.astype(np.int32)


def _toward_zero(a: Array, b: ArrayLike) -> Array:
    """a / b as C and ONNX divide; b > 0."""
    quotient: Array = np.sign(a) * (np.abs(a) // np.asarray(b))
    return quotient


def _powers_reached(x: Array, first: int, last: int) -> Array:
    """How many of 2^first .. 2^last are at most ``x``."""
    return np.asarray(sum((x >= 2**i).astype(np.int64) for i in range(first, last + 1)))


# --------------------------------------------------------------------------- to another grid


def fit(factor: ArrayLike, bits: int = MULTIPLIER_BITS, *, common: bool = False) -> tuple[Array, Array, int]:
    """``(multiplier, divisor, lift)`` with factor ~ 2^lift * multiplier / (2^16 * divisor).

    factor: real, of any sign and shape. Multipliers are int32 below 2^bits in size,
    divisors powers of two up to 2^29. ``lift`` is 0 where every |factor| < 0.5; otherwise the value must be
    multiplied by 2^lift before ``requantize``. The relative error is at most 2^-bits, for factors of at least
    2^-31; ``common`` takes the divisor of the largest factor for all, with that error relative to the largest.
    """
    real = np.asarray(factor, np.float64)
    if not np.isfinite(real).all():
        raise UserError("a factor between two grids is not finite", hint="check the scales that it is made of")
    size = np.abs(real)
    lift = max(0, math.frexp(float(size.max(initial=0.0)))[1] + 1)
    size = np.ldexp(size, -lift)
    exponent = np.frexp(size)[1]
    exponent = exponent + (np.rint(np.ldexp(size, bits - exponent)) >= 2**bits)  # it rounds up to a power of two
    exponent = np.clip(exponent.max(initial=-30) if common else exponent, -30, -1)
    mantissa = np.minimum(np.rint(np.ldexp(size, bits - exponent)), 2**bits - 1)
    multiplier = np.sign(real) * mantissa * 2.0 ** (MULTIPLIER_BITS - bits)
    divisor = np.broadcast_to(np.ldexp(1.0, -1 - exponent), () if common else real.shape)
    return multiplier.astype(np.int32), divisor.astype(np.int32), lift


def requantize(x: ArrayLike, multiplier: ArrayLike, divisor: ArrayLike, low: int, high: int) -> Array:
    """x * multiplier / (2^16 * divisor), rounded half up, in low..high.

    |x| < 2^30, |multiplier| < 2^15, divisor a power of two in 1..2^29; they broadcast. With divisor 1, a factor
    of 0.25 or more, the result is rounded down. Equal to (x * m + 2^15 * d) >> (16 + log2 d) in int64 for d > 1.
    """
    d = _int64(divisor)
    product = _int64(x) * _int64(multiplier) // 2**16
    return _int32(np.clip((product + d // 2) // d, low, high))


def rescale(
    x: ArrayLike, before: ArrayLike, lift: ArrayLike, multiplier: ArrayLike, divisor: ArrayLike, after: ArrayLike,
    inside: tuple[int, int], between: tuple[int, int], outside: tuple[int, int],
) -> Array:  # fmt: skip
    """``requantize`` of (x + before) * lift, and what is added and clipped around it, in one operator.

    ``lift``, powers of two up to 2^30, saturates below 2^30. inside, between and outside are the ends of x + before,
    of what ``requantize`` gives and of that + after.
    """
    most = (2**30 - 1) // _int64(lift)
    begun = np.clip(np.clip(_int64(x) + _int64(before), *inside), -most, most) * _int64(lift)
    return _int32(np.clip(requantize(begun, multiplier, divisor, *between) + _int64(after), *outside))


def multiply_wide(a: ArrayLike, b: ArrayLike, narrow: int, divisor: int, low: int, high: int) -> Array:
    """a * b / (narrow * 2^16 * divisor) in low..high: the product of two wide values on a static grid.

    |a| < 2^30, |b| <= 2^29; ``narrow``, a power of two up to 2^15, brings b into +-32767 (more saturates), so
    the error is half a step of the result plus |a| / (2^17 * divisor).
    """
    short = np.clip((_int64(b) + narrow // 2) // narrow, -(2**15 - 1), 2**15 - 1)
    return requantize(a, short, divisor, low, high)


def split_bytes(x: ArrayLike) -> tuple[Array, Array]:
    """``(high, low)`` int8 with x = 256 * high + low, for |x| <= 127 * 256; low is in -128..127."""
    x = _int64(x)
    high = np.clip((x + 2**7) // 2**8, -127, 127)
    return high.astype(np.int8), np.clip(x - high * 2**8, -128, 127).astype(np.int8)


def quantize_per_token(x: ArrayLike, bits: int, symmetric: bool) -> tuple[Array, Array, Array, Array]:
    """``(codes, zero, step, divisor)`` of the rows of wide ``x`` (..., C), |x| < 2^29.

    codes: uint8 like x; the others int32 (..., 1). One code is worth step * 2^(33 - bits) / (2^16 * divisor)
    units of x, so that for products P of the codes ``requantize(P, step, divisor, ...)`` is P in units of x, over
    2^(33 - bits). Zero is exact, and the range holds it; symmetric codes lie around 2^(bits - 1). The error is
    half a step and 2^-21 of the range; ``step`` is right to 2^-14. A row of zeros has a small valid step.
    """
    x = _int64(x)
    hi = np.maximum(x.max(axis=-1, keepdims=True), 0)
    lo = np.minimum(x.min(axis=-1, keepdims=True), 0)
    size = np.maximum(hi, -lo) if symmetric else hi - lo
    grid_bits = bits - 1 if symmetric else bits
    levels = 2**grid_bits - 1
    shift = _powers_reached(size, 22, 28 if symmetric else 29)
    p = 2**shift
    top = 2**22 - 1
    short = np.clip(_toward_zero(x, p), -top, top)
    width = _toward_zero(hi, p) - _toward_zero(lo, p) if not symmetric else size // p
    width = np.clip(width, 2, top)
    if symmetric:
        zero = np.full_like(width, 2 ** (bits - 1))
        first, last = 1, 2**bits - 1
    else:
        zero = np.minimum((-_toward_zero(lo, p) * levels + width // 2) // width, levels)
        first, last = 0, levels
    codes = np.clip((short * levels + zero * width + width // 2) // width, first, last)
    octave = _powers_reached(width, 1, 21)
    whole = width * 2 ** (21 - octave)  # in 2^21..2^22
    step = np.clip((whole * 2**grid_bits + levels * 2**7) // (levels * 2**8), 1, 2**15 - 1)
    exponent = (29 if symmetric else 30) - octave - shift
    return codes.astype(np.uint8), _int32(zero), _int32(step), _int32(2 ** np.minimum(exponent, 29))


# --------------------------------------------------------------------------- norms


def isqrt(v: Array) -> Array:
    """floor(sqrt(v)) of int64 in 0..2^52, exactly."""
    root = np.sqrt(v.astype(np.float64)).astype(np.int64)
    root -= root * root > v
    exact: Array = root + ((root + 1) * (root + 1) <= v)
    return exact


def rms_norm(x: ArrayLike, epsilon: int = 0) -> Array:
    """x / sqrt(mean(x^2) + epsilon) over the last axis, in units of 2^-20, within +-2^26.

    |x| <= 2^29, at most 16,384 channels; ``epsilon`` < 2^29 in units of x^2. The mean is taken of x rounded to 14
    bits of the row's largest, its root has 9 guard bits. The result is right to 2^-13 of itself and 2^-14 of one.
    A root mean square below 32 units of x counts as 32: such rows are shorter, and a row of zeros is zero.
    """
    x = _int64(x)
    size = np.abs(x).max(axis=-1, keepdims=True)
    p = 2 ** _powers_reached(size, 14, 29)
    short = np.clip((x + p // 2) // p, -(2**14), 2**14)
    mean = (short * short).sum(axis=-1, keepdims=True) * 2**18 // x.shape[-1]
    mean = np.clip(mean + epsilon * 2**18 // p // p, 2**28, 2**48 - 1)
    root = np.minimum(isqrt(mean), 2**24 - 1)  # 2^9 times the root mean square of ``short``
    octave = 2 ** _powers_reached(root, 15, 23)
    multiplier = np.minimum((2**29 * octave + root // 2) // root, 2**15 - 1)
    scaled = short * multiplier + _toward_zero((x - short * p) * multiplier, p)
    return _int32(np.clip((scaled + octave // 2) // octave, -(2**26), 2**26))


def layer_norm(x: ArrayLike, epsilon: int = 0) -> Array:
    """``rms_norm`` of x less its mean, which is rounded to a unit of x; |x| <= 2^28."""
    x = _int64(x)
    n = x.shape[-1]
    return rms_norm(x - (x.sum(axis=-1, keepdims=True) + n // 2) // n, epsilon)


# --------------------------------------------------------------------------- attention


def halvings(bits: int) -> Array:
    """The table of round((2^bits - 1) * 2^-x) int32, x in steps of 1/OCTAVE from a half step on, down to 0."""
    count = (bits + 1) * OCTAVE
    values = np.rint((2**bits - 1) * np.exp2(-(np.arange(count + 1) + 0.5) / OCTAVE))
    values[0], values[-1] = 2**bits - 1, 0
    return _int32(values)


def softmax_weights(scores: ArrayLike, mask: Array, period: ArrayLike, lift: int, bits: int) -> tuple[Array, Array]:
    """``(weights, total)``: (2^bits - 1) * exp(score - row's largest) and its sum over the last axis (..., 1).

    |scores| <= 2^29; mask broadcasts, True attends; ``period`` int32 in 2^13..2^16 - 1, scalar or (..., 1), is
    ln 2 in units of scores * lift, 1 <= lift <= 2^19. Weights are int32 in 0..2^bits - 1, the row's largest is
    2^bits - 1. exp is right to 0.0007 and half a weight; with 8 bits what lies below 1/510 of the row's largest is
    lost, which rows of many small weights feel. A row that attends to nothing has weights 0, total 1.
    """
    table = halvings(bits)
    held = np.where(mask, _int64(scores), -(2**30))
    top = np.maximum(held.max(axis=-1, keepdims=True), -(2**29))
    cap = ((bits + 1) * 2**16 + lift - 1) // lift
    below = np.clip(top - held, 0, cap) * (lift * OCTAVE)
    weights = table[np.minimum(below // _int64(period), len(table) - 1)]
    return weights, _int32(np.maximum(weights.sum(axis=-1, keepdims=True, dtype=np.int64), 1))


def normalize_attention(sums: ArrayLike, total: ArrayLike) -> Array:
    """sums / total in units of 2^-7, rounded half up (exact): the mean of values by 8-bit weights.

    |sums| <= 128 * total, total <= 255 * 32768. Division by element: cheaper here than a reciprocal, and exact.
    """
    t = _int64(total)
    return _int32((_int64(sums) * 2**ATTENTION_FRACTION + t // 2) // t)


def normalize_attention16(high: ArrayLike, low: ArrayLike, total: ArrayLike, lift: int = 1) -> Array:
    """(256 * high + low) / total in units of 1 / (32 * lift): the mean of values by 16-bit weights.

    high, low: products of the weights' high and low bytes, below 2^30 when multiplied by ``lift``; a total below
    2^15 counts as 2^15. Right to 2^-14 of itself and one unit.
    """
    t = np.maximum(_int64(total), 2**15)
    octave = _powers_reached(t, 16, 30)
    multiplier = np.minimum((2 ** (30 + octave) + t // 2) // t, 2**15 - 1)
    ends = -(2**29), 2**29
    parts = (
        requantize(_int64(high) * lift, multiplier, 2 ** (octave + 1), *ends),
        requantize(_int64(low) * lift, multiplier, 2 ** (octave + 9), *ends),
    )
    return np.asarray(parts[0] + parts[1])


def rotary_embedding(x: ArrayLike, cos: ArrayLike, sin: ArrayLike) -> Array:
    """Halves of the last axis rotated; tables in units of 2^-14, |x| < 2^16; rounded half away from zero."""
    x = _int64(x)
    first, second = np.split(x, 2, axis=-1)
    turned = x * _int64(cos) + np.concatenate([-second, first], axis=-1) * _int64(sin)
    return _int32(_toward_zero(turned + np.sign(turned) * 2 ** (_ROPE_FRACTION - 1), 2**_ROPE_FRACTION))


# --------------------------------------------------------------------------- activations


_SIGMOIDS: dict[str, Callable[[Array], Array]] = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": lambda x: np.tanh(x / 2),  # of half its argument: an entry is twice as fine
}


def sigmoid_table(name: str) -> Array:
    """sigmoid, or tanh of half, in Q15 on -11..11 in steps of 1/1024; the ends are the limits; int32."""
    grid = np.arange(-REACH * SIGMOID_STEPS, REACH * SIGMOID_STEPS + 1) / SIGMOID_STEPS
    table = np.rint(_SIGMOIDS[name](grid) * 2**15).astype(np.int32)
    table[0], table[-1] = -(2**15) if name == "tanh" else 0, 2**15
    return np.asarray(table)


def _nearest(x: Array, unit: int, steps: int) -> Array:
    """x / unit, held to +-REACH, in whole steps."""
    step = unit // steps
    return np.asarray((np.clip(x, -REACH * unit, REACH * unit) + REACH * unit + step // 2) // step - REACH * steps)


def _sigmoid_entry(name: str, x: ArrayLike, unit: int) -> Array:
    return np.asarray(sigmoid_table(name)[_nearest(_int64(x), unit, SIGMOID_STEPS) + REACH * SIGMOID_STEPS])


def sigmoid(x: ArrayLike, unit: int) -> Array:
    """sigmoid(x / unit) in Q15, the nearest entry of a table; unit a power of two in 2^10..2^25; right to 1.4e-4."""
    return _sigmoid_entry("sigmoid", x, unit)


def tanh(x: ArrayLike, unit: int) -> Array:
    """tanh(x / unit) in Q15, the nearest entry of a table; unit a power of two in 2^11..2^26; right to 2.7e-4."""
    return _sigmoid_entry("tanh", x, unit // 2)


def _tail(x: float) -> float:
    """The chance that a normal variable is above x."""
    return math.erfc(x / math.sqrt(2)) / 2


_CUBE, _ROOT = 0.044715, math.sqrt(2 / math.pi)
_DENTS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + np.exp(x)),
    "gelu": lambda x: x * np.vectorize(_tail)(x),
    "gelu_tanh": lambda x: x * (1 - np.tanh(_ROOT * (x + _CUBE * x**3))) / 2,
}


def dent_table(name: str) -> Array:
    """What an activation lies below max(x, 0), an even function: Q16 on 0..11 in steps of 1/2048, 0 at the end."""
    table = np.rint(_DENTS[name](np.arange(REACH * DENT_STEPS + 1) / DENT_STEPS) * 2**DENT_FRACTION).astype(np.int32)
    table[-1] = 0
    return np.asarray(table)


def activation(name: str, x: ArrayLike, unit: int) -> Array:
    """``silu``, ``gelu`` or ``gelu_tanh`` of x / unit on the grid of x: max(x, 0) less an entry of a table.

    |x| <= 2^29, unit a power of two in 2^11..2^25. The error is at most 2.6e-4 and half a unit of x.
    """
    x = _int64(x)
    dent = dent_table(name)[_nearest(np.abs(x), unit, DENT_STEPS)].astype(np.int64)
    up, down = max(unit >> DENT_FRACTION, 1), max(2**DENT_FRACTION // unit, 1)
    return _int32(np.maximum(x, 0) - (dent * up + down // 2) // down)


def relu_squared(x: ArrayLike, narrow: int, divisor: int, high: int) -> Array:
    """max(x, 0)^2 / (narrow * 2^16 * divisor), at most ``high``; as ``multiply_wide``."""
    positive = np.maximum(np.asarray(x), 0)
    return multiply_wide(positive, positive, narrow, divisor, 0, high)
