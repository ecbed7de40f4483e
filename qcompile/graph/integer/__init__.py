"""Bodies of the integer operators: standard int32 operators, int64 on per-token vectors and sums only.

The function of ``quant/integer.py`` that is named beside a body says what it computes and for which inputs, and the
values that ``unit``, ``narrow``, ``divisor`` and the other attributes may have. A body holds every value by Max and Min
where it may multiply or divide, so that intervals alone, without relations between tensors, prove that nothing
overflows. Mod, Gather and BitShift by element are avoided: they cost ten times an addition in ONNX Runtime, while
GatherElements on flat tensors costs three.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable

from qcompile.graph.integer import activations, attention, grids, norms
from qcompile.graph.integer.parts import numbers
from qcompile.quant.integer import dent_table, halvings, sigmoid_table

_TEXTS = (*grids.BODIES, *norms.BODIES, *attention.BODIES, *activations.BODIES)
BODIES = {text.split(maxsplit=1)[0]: text for text in _TEXTS}

_TABLES: dict[str, Callable[[], str]] = {
    "halvings8": lambda: numbers(halvings(8), "uint8"),
    "halvings16_high": lambda: numbers(halvings(16) // 256, "uint8"),
    "halvings16_low": lambda: numbers(halvings(16) % 256, "uint8"),
    "sigmoid": lambda: numbers(sigmoid_table("sigmoid")),
    "tanh": lambda: numbers(sigmoid_table("tanh")),
    "silu": lambda: numbers(dent_table("silu")),
    "gelu": lambda: numbers(dent_table("gelu")),
    "gelu_tanh": lambda: numbers(dent_table("gelu_tanh")),
}


def body(name: str) -> str:
    """The text of the function ``name``, its tables written out."""
    text = BODIES[name]
    wanted = re.findall(r"\$(\w+)", text)
    return string.Template(text).substitute({key: _TABLES[key]() for key in wanted})
