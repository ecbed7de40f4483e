"""Sigmoid, tanh, SiLU and GELU by tables."""

from __future__ import annotations

from qcompile.graph.integer.parts import FLAT, attribute, constants, held, looked_up
from qcompile.quant.integer import DENT_FRACTION, DENT_STEPS, REACH, SIGMOID_STEPS


def _sigmoid(name: str, table: str, halved: bool = False) -> str:
    """x int32 -> Q15 int32, the nearest entry of ``sigmoid_table``: ``sigmoid``, ``tanh``."""
    unit = "\n        narrow = Div (unit, two)" if halved else "\n        narrow = Identity (unit)"
    return f"""{name} <unit> (x) => (y) {{
        {attribute("unit")}{FLAT}{constants(two=2, reach=REACH, steps=SIGMOID_STEPS)}
        table = Constant <value = ${table}> (){unit}
        step = Div (narrow, steps)
        limit = Mul (narrow, reach)
        lowest = Neg (limit)
        half = Div (step, two)
        offset = Add (limit, half){held("held", "x", "lowest", "limit")}
        moved = Add (held, offset)
        index = Div (moved, step){looked_up("y", "table", "index", "x")}
    }}"""


def _activation(name: str, table: str) -> str:
    """x int32 -> int32, max(x, 0) less the nearest entry of ``dent_table``: ``activation``."""
    return f"""{name} <unit> (x) => (y) {{
        {attribute("unit")}{FLAT}
        {constants(zero=0, one=1, two=2, reach=REACH, steps=DENT_STEPS, fraction=2**DENT_FRACTION)}
        table = Constant <value = ${table}> ()
        step = Div (unit, steps)
        limit = Mul (unit, reach)
        half = Div (step, two)
        size = Abs (x){held("held", "size", "zero", "limit")}
        moved = Add (held, half)
        index = Div (moved, step){looked_up("dent", "table", "index", "x")}
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


BODIES = (
    _sigmoid("IntegerSigmoid", "sigmoid"), _sigmoid("IntegerTanh", "tanh", halved=True),
    _activation("IntegerSilu", "silu"), _activation("IntegerGelu", "gelu"), _activation("IntegerGeluTanh", "gelu_tanh"),
)  # fmt: skip
