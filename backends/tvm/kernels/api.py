"""The kernels by what they compute, for a target; and their operands' packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qcompile.backends.tvm.kernels import generic
from qcompile.backends.tvm.kernels.amx import matmul_integer_amx
from qcompile.backends.tvm.kernels.features import features
from qcompile.backends.tvm.kernels.integer import matmul_integer_dot
from qcompile.backends.tvm.kernels.nbits import FloatProduct
from qcompile.backends.tvm.kernels.nbits_int8 import RoundedProduct
from qcompile.backends.tvm.kernels.packing import CodeLayout, pack_codes, pack_columns
from qcompile.backends.tvm.kernels.packing import pack_integer as _pack_integer
from qcompile.backends.tvm.kernels.w4a8 import CodesProduct
from qcompile.errors import UserError

LARGEST_SUM = 2**31 - 1
PrimFunc = Any


def matmul_integer(k: int, n: int, x_dtype: str, target: Any, *, symbol: str = "matmul_integer") -> PrimFunc:
    """(x (M, K) ``x_dtype``, packed W, y (M, N) int32), exact. ``x_dtype``: int8 or uint8; M is found at run time."""
    if x_dtype not in ("int8", "uint8"):
        raise UserError(f"integers of type {x_dtype} have no kernel", hint="give int8 or uint8")
    _check_depth(k, 255 * 128)
    found = features(target)
    if found.unit == "amx":
        return matmul_integer_amx(k, n, x_dtype, symbol)
    if found.unit == "loops":
        return generic.matmul_integer(k, n, x_dtype, symbol)
    return matmul_integer_dot(k, n, x_dtype, found, symbol)


def pack_integer(weight: np.ndarray, target: Any = None) -> np.ndarray:
    """W (K, N) int8 as ``matmul_integer`` reads it; one layout for all targets."""
    if weight.dtype != np.int8 or weight.ndim != 2:
        raise UserError(f"weights are {weight.dtype} of rank {weight.ndim}", hint="give a matrix (K, N) of int8")
    return _pack_integer(weight)


def matmul_nbits(
    k: int, n: int, bits: int, group: int | None, target: Any, *, x_dtype: str = "float32",
    zero_points: bool = True, symbol: str = "matmul_nbits",
) -> PrimFunc:  # fmt: skip
    """(x (M, K) float32, codes, scale[, zero], y (M, N) float32): x times dequantised W, in float32.

    ``group``: rows that share a scale, None for whole columns. Without ``zero_points`` all are 2^(bits - 1).
    """
    if x_dtype != "float32":
        raise UserError(f"x of type {x_dtype} has no kernel here", hint="give float32")
    layout = layout_of(k, n, bits, group)
    found, middle = features(target), None if zero_points else 2 ** (bits - 1)
    if found.unit == "loops":
        return generic.matmul_nbits(layout, middle, symbol)
    return FloatProduct(layout, found, middle).primitive(symbol)


def matmul_nbits_int8(
    k: int, n: int, bits: int, group: int | None, target: Any, *,
    zero_points: bool = True, symbol: str = "matmul_nbits_int8",
) -> PrimFunc:  # fmt: skip
    """The same arguments; x is rounded to 8 bits in blocks of a group inside (accuracy level 4 of MatMulNBits)."""
    layout = layout_of(k, n, bits, group)
    found, middle = features(target), None if zero_points else 2 ** (bits - 1)
    _check_depth(layout.stored_group, 127 * (2**bits - 1))
    if found.unit == "loops":
        raise UserError("matmul_nbits_int8 has no kernel for GPUs here", hint="take matmul_nbits")
    return RoundedProduct(layout, found, middle).primitive(symbol)


def matmul_w4a8(
    k: int, n: int, bits: int, group: int | None, target: Any, *, x_dtype: str = "int8",
    zero_points: bool = True, static: bool = False, symbol: str = "matmul_w4a8",
) -> PrimFunc:  # fmt: skip
    """(x codes (M, K), step (M)[, x_zero (M) int32], codes, scale[, zero][, sums], y (M, N) float32).

    int8 codes of x stand around 0; uint8 ones around ``x_zero``, and then ``sums`` is an argument. ``static``: one grid
    for all of x, of which ``pack_nbits`` is told: no ``step``, no ``x_zero``, and ``sums`` always.
    """
    if x_dtype not in ("int8", "uint8"):
        raise UserError(f"codes of type {x_dtype} have no kernel", hint="give int8 or uint8")
    layout = layout_of(k, n, bits, group)
    found, middle = features(target), None if zero_points else 2 ** (bits - 1)
    _check_depth(layout.stored_group, 255 * (2**bits - 1))
    if found.unit == "loops":
        raise UserError("matmul_w4a8 has no kernel for GPUs here", hint="take matmul_nbits")
    return CodesProduct(layout, found, middle, x_dtype, static).primitive(symbol)


def layout_of(k: int, n: int, bits: int, group: int | None) -> CodeLayout:
    return CodeLayout(k, n, bits, k if group is None else min(group, k))


def pack_nbits(
    codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, bits: int, group: int | None,
    *, sums: bool = False, x_zero: int | None = None,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Operands of the kernels of low-bit weights, in their order: codes, scale[, zero][, sums].

    codes uint8 (K, N); scales and zero_points (K / group, N), or (N) with one group. ``sums``: of (code - zero) over
    each group, which ``matmul_w4a8`` needs where x has zero points. ``x_zero``: of a static x (less 128 for uint8
    codes), for which ``scales`` hold its step too.
    """
    depth, columns = codes.shape
    layout = layout_of(depth, columns, bits, group)
    if codes.max(initial=0) >= 2**bits:
        raise UserError(f"a code of {codes.max()} does not fit {bits} bits", hint="codes are 0 .. 2^bits - 1")
    packed = [pack_codes(codes, layout), pack_columns(np.asarray(scales, np.float32), layout, "float32")]
    if zero_points is not None:
        packed.append(pack_columns(np.asarray(zero_points), layout, "uint8"))
    if sums or x_zero is not None:
        held = _group_sums(codes, zero_points, layout) * (1 if x_zero is None else x_zero)
        packed.append(pack_columns(held, layout, "int32"))
    return tuple(packed)


def _group_sums(codes: np.ndarray, zero_points: np.ndarray | None, layout: CodeLayout) -> np.ndarray:
    rows = np.arange(layout.depth) // layout.group
    zeros: Any = 2 ** (layout.bits - 1)
    if zero_points is not None:
        zeros = zero_points.reshape(layout.groups, layout.columns).astype(np.int64)[rows]
    found = np.zeros((layout.groups, layout.columns), np.int64)
    np.add.at(found, rows, codes.astype(np.int64) - zeros)
    return found


def _check_depth(depth: int, largest: int) -> None:
    if depth * largest > LARGEST_SUM:
        raise UserError(
            f"sums over {depth} rows can leave int32", hint=f"take groups of at most {LARGEST_SUM // largest} rows"
        )


KERNELS: dict[str, Callable[..., PrimFunc]] = {
    "matmul_integer": matmul_integer,
    "matmul_nbits": matmul_nbits,
    "matmul_nbits_int8": matmul_nbits_int8,
    "matmul_w4a8": matmul_w4a8,
}
