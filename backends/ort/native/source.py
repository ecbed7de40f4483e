"""The C source of the kernels: their parts in one file, with the tables of ``quant/integer.py`` written out.

One file is what a user can read, keep beside the program and compile for another machine. A kernel gives bit for bit
what the body of its operator (``graph/integer``) gives for the inputs that the body is made for.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from qcompile.calibration.library import LIBRARY
from qcompile.quant import integer

SOURCE = "qcompile_kernels.c"
FLAGS = ("-std=gnu11", "-O3", "-fwrapv", "-fvisibility=hidden", "-shared", "-fPIC")
PARTS = ("runtime", "rescale", "attention", "rows", "operators")
_PER_LINE = 24


def command(compiler: str = "cc") -> list[str]:
    """The command that makes the library of the source, in their folder."""
    return [compiler, *FLAGS, "-o", LIBRARY, SOURCE]


@functools.cache
def source() -> str:
    """The whole file."""
    head, *rest = (Path(__file__).with_name(f"{part}.c").read_text(encoding="utf-8") for part in PARTS)
    about = f"/* Kernels of the integer operators of qcompile, for ONNX Runtime. Compile with\n *     {_shown()}\n */\n"
    return "\n".join([about, head, _constants(), _tables(), *rest])


def _shown() -> str:
    return " ".join(command())


def _constants() -> str:
    values = {
        "OCTAVE": integer.OCTAVE,
        "REACH": integer.REACH,
        "SIGMOID_STEP_BITS": integer.SIGMOID_STEPS.bit_length() - 1,
        "DENT_STEP_BITS": integer.DENT_STEPS.bit_length() - 1,
        "DENT_FRACTION": integer.DENT_FRACTION,
    }
    return f"enum {{ {', '.join(f'{name} = {value}' for name, value in values.items())} }};\n"


def _tables() -> str:
    tables = {
        "halvings8": ("uint16_t", integer.halvings(8)),
        "halvings16": ("uint16_t", integer.halvings(16)),
        "sigmoid": ("int32_t", integer.sigmoid_table("sigmoid")),
        "tanh_of_half": ("int32_t", integer.sigmoid_table("tanh")),
        "silu": ("uint16_t", integer.dent_table("silu")),
        "gelu": ("uint16_t", integer.dent_table("gelu")),
        "gelu_tanh": ("uint16_t", integer.dent_table("gelu_tanh")),
    }
    return "\n".join(_table(name, kind, values) for name, (kind, values) in tables.items())


def _table(name: str, kind: str, values: np.ndarray) -> str:
    numbers = [str(int(value)) for value in values]
    lines = [",".join(numbers[start : start + _PER_LINE]) for start in range(0, len(numbers), _PER_LINE)]
    return f"static const {kind} {name}[] = {{\n" + ",\n".join(lines) + "\n};\n"
