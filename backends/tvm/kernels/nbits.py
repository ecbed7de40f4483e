"""x (M, K) float32 times codes of 2, 3, 4 or 8 bits: y (M, N) float32, in float32.

    y[m, n] = sum over groups g of  scale[g, n] * sum over k in g of x[m, k] * (code[k, n] - zero[g, n])
A panel of W is unpacked in registers for up to 12 rows of x. With AVX-512, one permutation turns codes of up to 4 bits
into floats: the code is the place in a table of 16, whatever bits lie above it.
"""

from __future__ import annotations

from typing import Any

from qcompile.backends.tvm.kernels import codes, emit
from qcompile.backends.tvm.kernels.emit import Expr, Register, T
from qcompile.backends.tvm.kernels.features import Features
from qcompile.backends.tvm.kernels.packing import CodeLayout
from qcompile.backends.tvm.kernels.panels import PanelProduct, split, total_of

_TABLE = 16


class FloatProduct(PanelProduct):
    """One kernel while it is written."""

    chunk = 24
    heights = (12, 4, 1)

    def __init__(self, layout: CodeLayout, features: Features, middle: int | None) -> None:
        super().__init__(layout, features, middle)
        self.lanes = _TABLE  # LLVM splits registers that the processor does not have
        self.table: Register | None = None

    def write(self, rows: Expr) -> None:
        if self.features.wide and self.layout.bits <= 4:
            self.table = Register(f"float32x{_TABLE}", _table(2**self.layout.bits, self.middle or 0))
        super().write(rows)

    def group(self, start: Expr, panel: Expr, group: Expr, column: int, results: list[Register], rows: int) -> None:
        count = split(len(results), rows)
        kind = f"float32x{self.lanes}"
        sums = [[Register(kind, emit.zeros("float32", self.lanes)) for _ in range(count)] for _ in results]
        at = [panel, group, T.int64(column)]
        zero = None if self.middle is not None else emit.bind(self._zero(at))
        whole, rest = divmod(rows, self.layout.rows)

        def step(number: Expr, filled: int = self.layout.rows) -> None:
            self._step(start, panel, number, sums, zero, filled)

        self.steps(group, whole, step)
        if rest:
            step(emit.bind(group * (self.layout.stored_group // self.layout.rows) + whole), rest)
        scale = emit.bind(self.scale.vload(at, f"float32x{self.lanes}"))
        for result, parts in zip(results, sums, strict=True):
            result.set(_fused(total_of(parts), scale, result.value, self.lanes))

    def _step(
        self, start: Expr, panel: Expr, step: Expr, sums: list[list[Register]], zero: Expr | None, filled: int
    ) -> None:
        held = codes.slabs(self.layout, self.w, panel, step, 0, self.lanes, len(sums))
        for row in range(filled):
            weight = emit.bind(self._weight(codes.lane_code(self.layout.bits, held, row, self.lanes), zero))
            for r, parts in enumerate(sums):
                x = emit.splat(self.x[start + r, step * self.layout.rows + row], self.lanes)
                total = parts[row % len(parts)]
                total.set(_fused(x, weight, total.value, self.lanes))

    def _weight(self, code: Expr, zero: Expr | None) -> Expr:
        """code - zero."""
        if self.table is not None:
            found = emit.pure(f"float32x{_TABLE}", "llvm.x86.avx512.permvar.sf.512", self.table.value, code)
        else:
            low = code if self.layout.bits == 3 else code & emit.splat(T.int32(2**self.layout.bits - 1), self.lanes)
            moved = low - emit.splat(T.int32(self.middle or 0), self.lanes)
            found = T.Cast(f"float32x{self.lanes}", moved)
        return found if zero is None else found - zero

    def _zero(self, at: list[Expr]) -> Expr:
        return T.Cast(f"float32x{self.lanes}", self.zero.vload(at, f"uint8x{self.lanes}"))


def _table(period: int, middle: int) -> Expr:
    """Float of (place mod period) - middle for the 16 places."""
    places = T.ramp(T.int32(0), 1, _TABLE) & emit.splat(T.int32(period - 1), _TABLE)
    return T.Cast(f"float32x{_TABLE}", places - emit.splat(T.int32(middle), _TABLE))


def _fused(left: Expr, right: Expr, total: Expr, lanes: int) -> Any:
    return emit.pure(f"float32x{lanes}", "llvm.fmuladd", left, right, total)
