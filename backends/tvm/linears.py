"""The seam to the kernels of linear layers: one function a kind, x (M, K) in, (M, N) out.

Weights are packed here, when the program is compiled; what the program binds at load is the packed form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx

from qcompile.backends.tvm.notes import Weight
from qcompile.backends.tvm.scopes import Program
from qcompile.backends.tvm.values import Tensor

PACKED = {2: 4, 4: 2}  # bits -> codes in a byte


def integer_linear(program: Program, x: Tensor, codes: np.ndarray, name: str) -> Tensor:
    """int32 sums of x (M, K) uint8 or int8 times ``codes`` (K, N)."""
    rows, columns = codes.shape
    held = program.parameter(f"{name}.codes", np.ascontiguousarray(codes), codes.dtype.name)

    def element(read: Callable[[int, Any], Any], index: Any, k: Any) -> Any:
        return tirx.Cast("int32", read(0, (index[0], k))) * tirx.Cast("int32", read(1, (k, index[1])))

    return program.contract((x.shape[0], columns), "int32", [x, held], element, rows, ("integer_linear", columns))


def weight_only_linear(program: Program, x: Tensor, weight: Weight) -> Tensor:
    """x (M, K) float32 times a dequantised matrix, whose codes are packed to their bits."""
    matrix, group = weight.matrix, weight.group
    rows, columns = matrix.shape
    scale, zero = weight.grids()
    low = int(matrix.min())
    bits = _bits(int(matrix.max()) - low)
    per = PACKED.get(bits, 1)
    if rows % per:
        bits, per = 8, 1
    codes = packed((matrix.astype(np.int32) - low).astype(np.uint8), bits)
    held = [
        program.parameter(f"{weight.name}.codes{bits}", codes, "uint8"),
        program.parameter(f"{weight.name}.scale", scale, "float32"),
        program.parameter(f"{weight.name}.zero", (zero - low).astype(np.float32), "float32"),
    ]
    mask = (1 << bits) - 1

    def element(read: Callable[[int, Any], Any], index: Any, k: Any) -> Any:
        n, at = index[1], tirx.floordiv(k, group)
        byte = read(1, (tirx.floordiv(k, per), n))
        if per > 1:
            shift = tirx.Cast("uint8", tirx.floormod(k, per) * bits)
            byte = tirx.bitwise_and(tirx.shift_right(byte, shift), tirx.const(mask, "uint8"))
        return read(0, (index[0], k)) * ((tirx.Cast("float32", byte) - read(3, (at, n))) * read(2, (at, n)))

    key = ("weight_only_linear", columns, bits, group)
    return program.contract((x.shape[0], columns), "float32", [x, *held], element, rows, key)


def float_linear(program: Program, x: Tensor, matrix: Tensor) -> Tensor:
    """x (M, K) times ``matrix`` (K, N), both floats."""
    rows, columns = matrix.shape

    def element(read: Callable[[int, Any], Any], index: Any, k: Any) -> Any:
        return read(0, (index[0], k)) * read(1, (k, index[1]))

    return program.contract((x.shape[0], columns), x.dtype, [x, matrix], element, rows, ("float_linear", columns))


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes (K, N) with 8 / bits rows in one: the first in the lowest bits."""
    per = PACKED.get(bits, 1)
    if per == 1:
        return np.ascontiguousarray(codes)
    rows = codes.reshape(codes.shape[0] // per, per, codes.shape[1])
    found = np.zeros((codes.shape[0] // per, codes.shape[1]), np.uint8)
    for place in range(per):
        found |= rows[:, place] << (place * bits)
    return found


def _bits(span: int) -> int:
    return next(bits for bits in (2, 4, 8) if span < 1 << bits)
