"""exp and erf of float32 as arithmetic, which LLVM makes vectors of; a call into the math library is one number a time.

    exp(x) = 2^n exp(r),  n = rint(x / ln 2),  |r| <= ln 2 / 2:  the series of exp, its error below that of rounding
    erf(x) = x P(x^2) / Q(x^2) for |x| <= 4, where float32 has reached 1
Both are within 4e-7 of the value, or of 1 for erf. Other types take the library.
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


def exp(x: Any, dtype: str) -> Any:
    """e^x, which does not exceed e^88."""
    return _held(x, _exp) if dtype == "float32" else tirx.exp(x)


def exp_lanes(x: Any, lanes: int) -> Any:
    """e^x of a vector of float32 without NaN; ``x`` is a variable."""
    return _exp(x, lanes)


def erf(x: Any, dtype: str) -> Any:
    return _held(x, _erf) if dtype == "float32" else tirx.erf(x)


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


def _erf(x: Any) -> Any:
    bound, square = tirx.Var("b", "float32"), tirx.Var("s", "float32")
    ratio = bound * _series(_ABOVE, square) / _series(_BELOW, square)
    clipped = tirx.max(tirx.min(x, _float(_ONE)), _float(-_ONE))
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
