"""x (M, K) float32 times codes of 2, 3, 4 or 8 bits, x rounded to 8 bits in blocks: y (M, N) float32.

    y[m, n] = sum over groups g of  step[m, g] * scale[g, n] * (sum of x_code * code - zero[g, n] * sum of x_code)
The inner sums are exact in int32. Blocks of x are the groups of W; with one scale a column, whole rows. A panel of W is
unpacked in registers for up to 8 rows of x.
"""

from __future__ import annotations

from qcompile.backends.tvm.kernels import codes, emit, tokens
from qcompile.backends.tvm.kernels.emit import Expr, Register, T, loop
from qcompile.backends.tvm.kernels.features import Features
from qcompile.backends.tvm.kernels.packing import CodeLayout
from qcompile.backends.tvm.kernels.panels import PanelProduct, split, total_of


class RoundedProduct(PanelProduct):
    """One kernel while it is written."""

    chunk = 32
    heights = (8, 2, 1)

    def __init__(self, layout: CodeLayout, features: Features, middle: int | None) -> None:
        super().__init__(layout, features, middle)
        self.signed = layout.bits == 8 and not features.wide
        self.rounded: tokens.Rounded

    def write(self, rows: Expr) -> None:
        self.rounded = tokens.memory(self.chunk, self.layout)
        super().write(rows)

    def prepare(self, first: Expr, height: Expr) -> None:
        with loop(height) as row:
            tokens.round_row(self.x, first + row, self.rounded, row, self.layout)

    def at(self, first: Expr, start: Expr) -> Expr:
        return start  # in the chunk's codes

    def group(self, start: Expr, panel: Expr, group: Expr, column: int, results: list[Register], rows: int) -> None:
        count = split(len(results), rows)
        kind = f"int32x{self.lanes}"
        sums = [[Register(kind, emit.zeros("int32", self.lanes)) for _ in range(count)] for _ in results]
        steps = -(-rows // self.layout.rows)
        self.steps(group, steps, lambda step: self._step(start, panel, step, column, sums))
        at = [panel, group, T.int64(column)]
        scale = emit.bind(self.scale.vload(at, f"float32x{self.lanes}"))
        for r, parts in enumerate(sums):
            exact = T.Cast(f"float32x{self.lanes}", total_of(parts) - self.correction(start, r, at))
            results[r].set(results[r].value + exact * self.factor(scale, start + r, group))

    def _step(self, start: Expr, panel: Expr, step: Expr, column: int, sums: list[list[Register]]) -> None:
        unpacked = codes.quads(self.layout, self.w, panel, step, column, self.lanes, rows=len(sums), signed=self.signed)
        for index, (row, code) in enumerate(unpacked):
            held = emit.bind(code)
            for r, parts in enumerate(sums):
                x = emit.quad_at(self.rounded.codes, [start + r, step * self.layout.rows + row])
                total = parts[index % len(parts)]
                total.set(emit.dot(self.features, total.value, held, emit.splat(x, self.lanes), self.lanes))

    def factor(self, scale: Expr, row: Expr, group: Expr) -> Expr:
        """What makes floats of the sums of row ``row`` of the chunk over a group."""
        return scale * emit.splat(self.rounded.steps[row, group], self.lanes)

    def correction(self, start: Expr, row: int, at: list[Expr]) -> Expr:
        """zero * sum x_code of a group, for every column; ``at``: (panel, group, column)."""
        row_sum = self.rounded.sums[start + row, at[1]]
        less = 128 if self.signed else 0
        if self.middle is not None:
            return emit.splat(row_sum * T.int32(self.middle - less), self.lanes)
        zero = T.Cast(f"int32x{self.lanes}", self.zero.vload(at, f"uint8x{self.lanes}"))
        return (zero - emit.splat(T.int32(less), self.lanes)) * emit.splat(row_sum, self.lanes)
