"""Pieces of text that the bodies of the integer operators are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def numbers(values: Sequence[int] | np.ndarray, kind: str = "int32") -> str:
    return f"{kind}[{len(values)}] {{{', '.join(str(int(value)) for value in values)}}}"


def attribute(*names: str) -> str:
    """int32 scalars from the attributes of the same names."""
    return "".join(
        f"""
        wide_{name} = Constant <value_int: int = @{name}> ()
        {name} = Cast <to = 6> (wide_{name})"""
        for name in names
    )


def constants(**values: int) -> str:
    """int32 scalars."""
    return "".join(f"\n        {name} = Constant <value = int32 {{{value}}}> ()" for name, value in values.items())


def wide_constants(**values: int) -> str:
    """int64 scalars."""
    return "".join(f"\n        {name} = Constant <value_int = {value}> ()" for name, value in values.items())


def reached(out: str, vector: str, first: int, last: int, kind: str = "int32") -> str:
    """How many of 2^first .. 2^last are at most ``vector`` (..., 1): int32."""
    return f"""
        marks_{out} = Constant <value = {numbers([2**i for i in range(first, last + 1)], kind)}> ()
        above_{out} = GreaterOrEqual ({vector}, marks_{out})
        ones_{out} = Cast <to = 6> (above_{out})
        {out} = ReduceSum <keepdims = 1> (ones_{out}, last)"""


def held(out: str, value: str, low: str, high: str) -> str:
    """``value`` within the constants ``low`` and ``high``."""
    return f"""
        floored_{out} = Max ({value}, {low})
        {out} = Min (floored_{out}, {high})"""


def rounded(out: str, value: str, divisor: str, lift: str, less: str = "") -> str:
    """``value`` [less a vector] over ``divisor``, rounded half up: ``lift``, a multiple of it, makes Div round down."""
    halves = f"half_{out}"
    subtracted = f"""
        left_{out} = Sub ({halves}, {less})"""
    return f"""
        {halves} = Div ({divisor}, two){subtracted if less else ""}
        offset_{out} = Add ({f"left_{out}" if less else halves}, {lift})
        moved_{out} = Add ({value}, offset_{out})
        quotient_{out} = Div (moved_{out}, {divisor})
        start_{out} = Div ({lift}, {divisor})
        {out} = Sub (quotient_{out}, start_{out})"""


def looked_up(out: str, table: str, index: str, like: str) -> str:
    """``table[index]`` in the shape of ``like``; the index is flattened, because GatherElements is fast on one axis."""
    return f"""
        shape_{out} = Shape ({like})
        indices_{out} = Reshape ({index}, flat)
        entries_{out} = GatherElements <axis = 0> ({table}, indices_{out})
        {out} = Reshape (entries_{out}, shape_{out})"""


LAST = "\n        last = Constant <value_ints = [-1]> ()"
FLAT = "\n        flat = Constant <value_ints = [-1]> ()"
POWERS = f"\n        powers = Constant <value = {numbers([2**i for i in range(31)])}> ()"
