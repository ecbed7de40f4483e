"""Dims as programs in postfix order, for plans that are followed without TVM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from qcompile.backends.mobile.plan import Code

_BINARY = {
    "Add": "+", "Sub": "-", "Mul": "*", "FloorDiv": "//", "FloorMod": "%", "Max": "max", "Min": "min",
}  # fmt: skip


def coded(dim: Any, variable: Callable[[Any], Code], unknown: Callable[[str], Exception]) -> Code:
    """``dim`` in postfix order. ``variable``: the code of a free variable; ``unknown``: an error for anything else."""
    if isinstance(dim, int | tirx.IntImm):
        return (("number", int(dim)),)
    if isinstance(dim, tirx.Cast):
        return coded(dim.value, variable, unknown)
    if isinstance(dim, tirx.Var):
        return variable(dim)
    name = type(dim).__name__
    if name not in _BINARY:
        raise unknown(str(dim))
    return (*coded(dim.a, variable, unknown), *coded(dim.b, variable, unknown), (_BINARY[name], 0))


class Numbers:
    """The number of each code in a plan's ``expressions``, which grow by those that are new."""

    def __init__(self, expressions: list[Code]) -> None:
        self._expressions = expressions
        self._known = {code: number for number, code in enumerate(expressions)}

    def of(self, code: Code) -> int:
        if code not in self._known:
            self._known[code] = len(self._known)
            self._expressions.append(code)
        return self._known[code]
