"""Writing TensorIR from Python: loops, registers and the vector operations that the kernels share.

Python loops unroll, ``loop`` does not. Vectors have a fixed width; LLVM splits those that are wider than the
processor's registers. A quad is four int8 side by side, seen as one int32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from qcompile.backends.tvm.kernels.features import PANEL, Features

Expr = Any  # a TensorIR expression
Buffer = Any
AHEAD = 64  # lines of 64 bytes: at the end of a page of memory processors stop fetching by themselves
FEW = 2  # rows of x that wait for memory
_ON_STACK = {"disable_lower_builtin": True}  # no workspace of TVM's runtime, which a kernel would have to bring along


def primitive(symbol: str, body: Callable[[Callable[..., Buffer], Expr], None]) -> Any:
    """A PrimFunc named ``symbol``. ``body(argument, rows)`` declares the arguments and writes the statements."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
        rows = T.int64()

        def argument(name: str, shape: Sequence[Any], dtype: str) -> Buffer:
            return T.arg(name, T.buffer(shape, dtype, align=_width(dtype), offset_factor=0))

        body(argument, rows)
    return builder.get()


def _width(dtype: str) -> int:
    return {"int8": 1, "uint8": 1, "float16": 2}.get(dtype, 4)


def int64(value: int) -> Expr:
    return T.int64(value)


@contextlib.contextmanager
def loop(count: Expr, start: Expr = 0) -> Iterator[Expr]:
    """A loop that stays one; its variable is int64."""
    first = int64(start) if isinstance(start, int) else start
    last = int64(count) if isinstance(count, int) else count
    with T.serial(first, last, annotations={"pragma_auto_unroll_max_step": 0}) as index:
        yield index


@contextlib.contextmanager
def when(condition: Expr) -> Iterator[None]:
    with T.If(condition), T.Then():
        yield


def bind(value: Expr) -> Expr:
    """A name for ``value``, computed once."""
    return T.bind(value)


class Register:
    """A mutable scalar or vector."""

    def __init__(self, dtype: str, value: Expr | None = None) -> None:
        element, _, lanes = dtype.partition("x")
        self._dtype, count = dtype, int(lanes or 1)
        self._place = T.alloc_buffer((count,), element, align=4 * count, annotations=_ON_STACK)
        self._index = T.ramp(T.int32(0), 1, count) if count > 1 else 0
        if value is not None:
            self.set(value)

    def set(self, value: Expr) -> None:
        T.buffer_store(self._place, value, [self._index])

    @property
    def value(self) -> Expr:
        return self._place.vload([0], self._dtype)


def stack(shape: Sequence[int], dtype: str) -> Buffer:
    """Memory on the stack, at an address that a whole register may be read from."""
    return T.alloc_buffer(tuple(shape), dtype, align=64, annotations=_ON_STACK)


def cleared_stack(shape: tuple[int, int], dtype: str) -> Buffer:
    """The same, all zeros. Memory that an intrinsic writes must be: TVM drops what no statement touches."""
    made = stack(shape, dtype)
    with loop(shape[0]) as row:
        store(made, [row, ramp(int64(0), shape[1])], splat(T.Cast(dtype, 0), shape[1]))
    return made


def store(buffer: Buffer, indices: Sequence[Expr], value: Expr) -> None:
    T.buffer_store(buffer, value, list(indices))


def splat(value: Expr, lanes: int) -> Expr:
    return value if lanes == 1 else T.broadcast(value, lanes)


def zeros(dtype: str, lanes: int) -> Expr:
    return splat(T.float32(0) if dtype == "float32" else T.int32(0), lanes)


def ramp(start: Expr, lanes: int) -> Expr:
    return T.ramp(start, 1, lanes)


def pure(dtype: str, intrinsic: str, *arguments: Expr) -> Expr:
    return T.call_llvm_pure_intrin(dtype, intrinsic, *arguments)


def effect(intrinsic: str, *arguments: Expr) -> None:
    T.evaluate(T.call_llvm_intrin("void", intrinsic, *arguments))


def address(buffer: Buffer, indices: Sequence[Expr]) -> Expr:
    return T.address_of(buffer[tuple(indices)])


def prefetch(buffer: Buffer, panel: Expr, slab: Expr, column: Expr, lanes: int, rows: int) -> None:
    """Ask for what lies ``AHEAD`` slabs on in memory, beyond the buffer too; only where few rows of x need it.

    Among many rows it costs more than it gains, and on ARM nobody has timed it.
    """
    if lanes != PANEL or rows > FEW:
        return
    indices = [panel, slab + AHEAD, column, int64(0)]
    effect("llvm.prefetch.p0", address(buffer, indices), T.int32(0), T.int32(3), T.int32(1))


def quad_at(buffer: Buffer, indices: Sequence[Expr]) -> Expr:
    """The four int8 or uint8 from ``indices`` on, as an int32."""
    loaded = buffer.vload(list(indices), f"{buffer.dtype}x4")
    return T.reinterpret("int32", loaded)


def slab_at(buffer: Buffer, indices: Sequence[Expr], lanes: int) -> Expr:
    """``lanes`` quads from ``indices`` on."""
    return T.reinterpret(f"int32x{lanes}", buffer.vload(list(indices), f"{buffer.dtype}x{4 * lanes}"))


def dot(features: Features, total: Expr, unsigned: Expr, signed: Expr, lanes: int) -> Expr:
    """total (int32 x lanes) + the products of the quads of both sides.

    On ARM, and without dot products, both sides are taken as signed: ``unsigned`` holds 0..127 there.
    """
    if features.unit in ("amx", "vnni"):
        left, right = (T.reinterpret(f"int8x{4 * lanes}", side) for side in (unsigned, signed))
        return pure(f"int32x{lanes}", "llvm.x86.avx512.vpdpbusd.512", total, left, right)
    if features.unit == "sdot":
        left, right = (T.reinterpret("int8x16", side) for side in (unsigned, signed))
        return pure("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", total, left, right)
    unsigned, signed = bind(unsigned), bind(signed)
    for place in range(4):
        total = total + _byte(unsigned, place, lanes) * _byte(signed, place, lanes)
    return total


def _byte(quads: Expr, place: int, lanes: int) -> Expr:
    """The signed byte at ``place`` of each quad, as int32."""
    high = quads << splat(T.int32(24 - 8 * place), lanes) if place < 3 else quads
    return high >> splat(T.int32(24), lanes)


def store_columns(
    buffer: Buffer, row: Expr, column: Expr, columns: int, values: Sequence[Expr], *, whole: bool
) -> None:
    """Write the vectors ``values`` from (row, column) on; where not ``whole``, no further than ``columns``."""
    lanes = PANEL // len(values)
    dtype = str(buffer.dtype)
    if whole:
        for index, value in enumerate(values):
            store(buffer, [row, ramp(column + lanes * index, lanes)], value)
        return
    held = stack((PANEL,), dtype)
    for index, value in enumerate(values):
        store(held, [ramp(int64(lanes * index), lanes)], value)
    with loop(T.min(int64(PANEL), int64(columns) - column)) as place:
        store(buffer, [row, column + place], held[place])


__all__ = [
    "Buffer", "Expr", "Register", "T", "address", "bind", "cleared_stack", "dot", "effect", "int64", "loop", "prefetch",
    "primitive", "pure", "quad_at", "ramp", "slab_at", "splat", "stack", "store", "store_columns", "when", "zeros",
]  # fmt: skip
