"""Linear layers: one function a kind, x (M, K) in, (M, N) out, by a low-bit kernel of ``written`` or by loops here.

Weights are packed when the program is compiled; what the program binds at load is the packed form. Each function keeps
on record at ``where`` what it took.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from tvm import tirx

from qcompile.backends.tvm import on_gpu as gpu
from qcompile.backends.tvm import written
from qcompile.backends.tvm.notes import Weight
from qcompile.backends.tvm.scopes import Program
from qcompile.backends.tvm.tiles import tiled
from qcompile.backends.tvm.values import Tensor

Element = Callable[[Callable[[int, Any], Any], Any, Any], Any]  # (read, row, column) -> element
PACKED = {2: 4, 4: 2}  # bits -> codes in a byte


def integer_linear(program: Program, x: Tensor, codes: np.ndarray, name: str, where: str) -> Tensor:
    """int32 sums of x (M, K) uint8 or int8 times ``codes`` (K, N)."""
    found = gpu.integer(program, x, codes, name) if gpu.is_gpu(program) else written.integer(program, x, codes, name)
    program.note(where, found[1] if found else "integer_linear")
    if found:
        return found[0]
    columns = codes.shape[1]
    held = program.parameter(f"{name}.codes", np.ascontiguousarray(codes), codes.dtype.name)

    return _product(
        program, x, [held], columns, "int32", lambda read, m, k: tirx.Cast("int32", read(0, (m, k))),
        lambda read, k, n: tirx.Cast("int32", read(1, (k, n))), ("integer_linear", columns),
    )  # fmt: skip


def weight_only_linear(program: Program, x: Tensor, weight: Weight, where: str) -> Tensor:
    """x (M, K) float32 times a dequantised matrix, whose codes are packed to their bits."""
    found = gpu.weight_only(program, x, weight) if gpu.is_gpu(program) else written.weight_only(program, x, weight)
    program.note(where, found[1] if found else "weight_only_linear")
    if found:
        return found[0]
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

    def right(read: Callable[[int, Any], Any], k: Any, n: Any) -> Any:
        at = tirx.floordiv(k, group)
        byte = read(1, (tirx.floordiv(k, per), n))
        if per > 1:
            shift = tirx.Cast("uint8", tirx.floormod(k, per) * bits)
            byte = tirx.bitwise_and(tirx.shift_right(byte, shift), tirx.const(mask, "uint8"))
        return (tirx.Cast("float32", byte) - read(3, (at, n))) * read(2, (at, n))

    key = ("weight_only_linear", columns, bits, group)
    return _product(program, x, held, columns, "float32", lambda read, m, k: read(0, (m, k)), right, key)


def float_linear(program: Program, x: Tensor, matrix: Tensor) -> Tensor:
    """x (M, K) times ``matrix`` (K, N), both floats."""
    columns = matrix.shape[1]
    return _product(
        program, x, [matrix], columns, x.dtype, lambda read, m, k: read(0, (m, k)), lambda read, k, n: read(1, (k, n)),
        ("float_linear", columns),
    )  # fmt: skip


def _product(
    program: Program, x: Tensor, held: Sequence[Tensor], columns: int, dtype: str, left: Element, right: Element,
    key: Hashable,
) -> Tensor:  # fmt: skip
    """The sum over k of ``left(read, m, k) * right(read, k, n)``; ``read`` numbers x and then ``held``."""
    operands, depth = [x, *held], x.shape[1]
    if program.tiles:
        return tiled(
            program, (), (x.shape[0], columns, depth), dtype, operands, lambda read, _, m, k: left(read, m, k),
            lambda read, _, k, n: right(read, k, n), key, pack=False,
        )  # fmt: skip

    def element(read: Callable[[int, Any], Any], index: Any, k: Any) -> Any:
        return left(read, index[0], k) * right(read, k, index[1])

    return program.contract((x.shape[0], columns), dtype, operands, element, depth, key)


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
