"""Codes of x (M, K) int8 or uint8 times codes of W of 2, 3, 4 or 8 bits: y (M, N) float32.

    y[m, n] = step[m] * sum over groups g of  scale[g, n] * sum over k in g of (x[m, k] - x_zero[m]) * (code - zero)
The inner sums are exact in int32. ``step`` and ``x_zero`` are those of FakeQuantizePerToken; symmetric x has no zero.
Where x has one, ``sums`` holds the sum of (code - zero) over each group, since
    sum (x - z) w = sum (x - 128) w - (z - 128) sum w
A static x has one step, which is part of ``scale``, and one zero: ``sums`` are multiplied by it (less 128) beforehand.
"""

from __future__ import annotations

from typing import Any

from qcompile.backends.tvm.kernels import emit
from qcompile.backends.tvm.kernels.emit import Buffer, Expr, Register, T, int64, loop
from qcompile.backends.tvm.kernels.features import PANEL, Features
from qcompile.backends.tvm.kernels.nbits_int8 import RoundedProduct
from qcompile.backends.tvm.kernels.packing import CodeLayout


class CodesProduct(RoundedProduct):
    """One kernel while it is written. ``x_dtype``: int8, or uint8 around ``x_zero``."""

    def __init__(
        self, layout: CodeLayout, features: Features, middle: int | None, x_dtype: str, static: bool
    ) -> None:
        super().__init__(layout, features, middle)
        self.code_dtype, self.static = x_dtype, static
        self.centred = x_dtype == "int8"
        self.x_zero: Buffer
        self.sums: Buffer
        self.step: Buffer
        self.first: Expr

    def declare(self, argument: Any, rows: Expr) -> None:
        layout = self.layout
        self.x = argument("x", (rows, layout.depth), self.code_dtype)
        if not self.static:
            self.step = argument("step", (rows,), "float32")
        if not (self.static or self.centred):
            self.x_zero = argument("x_zero", (rows,), "int32")
        self.w = argument("w", layout.shape, "uint8")
        self.scale = argument("scale", layout.scale_shape, "float32")
        if self.middle is None:
            self.zero = argument("zero", layout.scale_shape, "uint8")
        if self.static or not self.centred:
            self.sums = argument("sums", layout.scale_shape, "int32")
        self.y = argument("y", (rows, layout.columns), "float32")

    def prepare(self, first: Expr, height: Expr) -> None:
        self.first = first
        with loop(height) as row:
            whole = self.layout.depth // self.layout.group
            if whole:
                with loop(whole) as group:
                    self._copy(first, row, group, self.layout.group)
            if self.layout.depth % self.layout.group:
                self._copy(first, row, int64(whole), self.layout.depth % self.layout.group)

    def _copy(self, first: Expr, row: Expr, group: Expr, length: int) -> None:
        """A group of a row into the chunk's codes, as int8, with its sum."""
        start = emit.bind(group * self.layout.group)
        vectors, rest = length // PANEL, length % PANEL
        total = Register(f"int32x{PANEL}", emit.zeros("int32", PANEL))
        with loop(vectors) as index:
            place = emit.bind(start + index * PANEL)
            found = emit.bind(self._centred(self.x.vload([first + row, place], f"{self.code_dtype}x{PANEL}"), PANEL))
            total.set(total.value + found)
            emit.store(self.rounded.codes, [row, emit.ramp(place, PANEL)], T.Cast(f"int8x{PANEL}", found))
        tail = Register("int32", emit.pure("int32", "llvm.vector.reduce.add", total.value))
        with loop(rest) as index:
            place = emit.bind(start + (vectors * PANEL + index))
            code = emit.bind(self._centred(self.x[first + row, place], 1))
            tail.set(tail.value + code)
            emit.store(self.rounded.codes, [row, place], T.Cast("int8", code))
        filled = -(-length // self.layout.rows) * self.layout.rows
        with loop(filled - length) as index:
            emit.store(self.rounded.codes, [row, start + length + index], T.int8(0))
        emit.store(self.rounded.sums, [row, group], tail.value)

    def _centred(self, code: Expr, lanes: int) -> Expr:
        wide = T.Cast(f"int32x{lanes}" if lanes > 1 else "int32", code)
        return wide if self.centred else wide - emit.splat(T.int32(128), lanes)

    def factor(self, scale: Expr, row: Expr, group: Expr) -> Expr:
        return scale if self.static else scale * emit.splat(self.step[self.first + row], self.lanes)

    def correction(self, start: Expr, row: int, at: list[Expr]) -> Expr:
        less = super().correction(start, row, at)
        if self.centred and not self.static:
            return less
        sums = self.sums.vload(at, f"int32x{self.lanes}")
        if self.static:
            return less + sums
        zero = self.x_zero[self.first + start + row] - T.int32(128)
        return less + sums * emit.splat(zero, self.lanes)

