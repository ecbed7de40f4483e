"""exp, erf and tanh of float32 as arithmetic: LLVM makes vectors of it, and the math library takes one number a time.

    exp(x) = 2^n exp(r),  n = rint(x / ln 2),  |r| <= ln 2 / 2:  the series of exp, its error below that of rounding
    erf(x) = x P(x^2) / Q(x^2) for |x| <= 4, tanh(x) for |x| <= 9, where float32 has reached 1
All are within 4e-7 of the value, or of 1 for erf. Other types take the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

_LOWEST, _HIGHEST = -87.0, 88.0  # exp of less is taken for 0
_TERMS = 8
_HIGH = 2839 / 4096  # of ln 2 in 12 bits: its product with n is exact
_LOW = math.log(2) - _HIGH
_ABOVE = (-1.60960333262415e-02, -2.95459980854025e-03, -7.34990630326855e-04, -5.69250639462346e-05,
          -2.10102402082508e-06, 2.77068142495902e-08, -2.72614225801306e-10)  # fmt: skip
_BELOW = (-1.42647390514189e-02, -7.37332916720468e-03, -1.68282697438203e-03, -2.13374055278905e-04,
          -1.45660718464996e-05)  # fmt: skip
_ONE = 4.0
_TANH_ABOVE = (4.89352455891786e-03, 6.37261928875436e-04, 1.48572235717979e-05, 5.12229709037114e-08,
               -8.60467152213735e-11, 2.00018790482477e-13, -2.76076847742355e-16)  # fmt: skip
_TANH_BELOW = (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)
_TANH_ONE = 9.0


def exp(x: Any, dtype: str) -> Any:
    """e^x, which does not exceed e^88."""
    return _held(x, _exp) if dtype == "float32" else tirx.exp(x)


def exp_lanes(x: Any, lanes: int) -> Any:
    """e^x of a vector of float32 without NaN; ``x`` is a variable."""
    return _exp(x, lanes)


def erf(x: Any, dtype: str) -> Any:
    return _held(x, lambda v: _ratio(v, _ABOVE, _BELOW, _ONE)) if dtype == "float32" else tirx.erf(x)


def tanh(x: Any, dtype: str) -> Any:
    return _held(x, lambda v: _ratio(v, _TANH_ABOVE, _TANH_BELOW, _TANH_ONE)) if dtype == "float32" else tirx.tanh(x)


def _held(x: Any, of: Callable[[Any], Any]) -> Any:
    """``of`` a variable for ``x``; what is no number stays what it is."""
    value = tirx.Var("e", "float32")
    return tirx.Let(value, x, tirx.Select(tirx.isnan(value), value, of(value)))


def _exp(x: Any, lanes: int = 1) -> Any:
    n, r = (tirx.Var(name, _kind("float32", lanes)) for name in "nr")

    def number(value: float) -> Any:
        return _splat(_float(value), lanes)

    bound = tirx.max(tirx.min(x, number(_HIGHEST)), number(_LOWEST))
    exponent = tirx.Cast(_kind("int32", lanes), n) + _splat(tirx.const(127, "int32"), lanes)
    bits = exponent * _splat(tirx.const(2**23, "int32"), lanes)
    grown = _series([1 / math.factorial(term) for term in range(_TERMS)], r, lanes)
    scaled = grown * tirx.call_intrin(_kind("float32", lanes), "tirx.reinterpret", bits)
    whole = tirx.nearbyint(bound * number(1 / math.log(2)))
    rest = bound - n * number(_HIGH) - n * number(_LOW)
    return tirx.Select(x < number(_LOWEST), number(0.0), tirx.Let(n, whole, tirx.Let(r, rest, scaled)))


def _ratio(x: Any, above: Sequence[float], below: Sequence[float], one: float) -> Any:
    """An odd function that is 1 from ``one`` on: x times a quotient of series of x^2."""
    bound, square = tirx.Var("b", "float32"), tirx.Var("s", "float32")
    ratio = bound * _series(above, square) / _series(below, square)
    clipped = tirx.max(tirx.min(x, _float(one)), _float(-one))
    return tirx.Let(bound, clipped, tirx.Let(square, bound * bound, ratio))


def _series(factors: Sequence[float], x: Any, lanes: int = 1) -> Any:
    total = _splat(_float(factors[-1]), lanes)
    for factor in reversed(factors[:-1]):
        total = total * x + _splat(_float(factor), lanes)
    return total


def _float(value: float) -> Any:
    return tirx.const(value, "float32")


def _splat(value: Any, lanes: int) -> Any:
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def _kind(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"
