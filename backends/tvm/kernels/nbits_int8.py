"""x (M, K) float32 times codes of 2, 3, 4 or 8 bits, x rounded to 8 bits in blocks: y (M, N) float32.

    y[m, n] = sum over groups g of  step[m, g] * scale[g, n] * (sum over k in g of x_code * code - zero[g, n] * sum x_code)
The inner sums are exact in int32. Blocks of x are the groups of W; with one scale a column, whole rows. A panel of W is
unpacked in registers for up to 8 rows of x.
"""

from __future__ import annotations

from typing import Any

from qcompile.backends.tvm.kernels import codes, emit, tokens
from qcompile.backends.tvm.kernels.emit import Buffer, Expr, Register, T, int64, loop
from qcompile.backends.tvm.kernels.features import PANEL, Features
from qcompile.backends.tvm.kernels.integer import store_panel
from qcompile.backends.tvm.kernels.packing import CodeLayout

CHUNK = 32  # rows of x that are rounded before W passes
HEIGHTS = (8, 2, 1)
STEPS = 4  # of unpacking that are written out
_SHORT = 128  # rows; longer sums are split over more registers, whose additions overlap


class RoundedProduct:
    """One kernel while it is written. ``middle``: the zero point of all groups; None where they are an argument."""

    def __init__(self, layout: CodeLayout, features: Features, middle: int | None) -> None:
        self.layout, self.features, self.middle = layout, features, middle
        self.lanes = features.lanes
        self.signed = layout.bits == 8 and not features.wide
        self.x: Buffer
        self.w: Buffer
        self.scale: Buffer
        self.zero: Buffer
        self.y: Buffer
        self.rounded: tokens.Rounded

    def write(self, rows: Expr) -> None:
        self.rounded = tokens.memory(CHUNK, self.layout)
        with loop(T.floordiv(rows + (CHUNK - 1), int64(CHUNK))) as chunk:
            first = emit.bind(chunk * CHUNK)
            height = emit.bind(T.min(int64(CHUNK), rows - first))
            with loop(height) as row:
                tokens.round_row(self.x, first + row, self.rounded, row, self.layout)
            with loop(-(-self.layout.columns // PANEL)) as panel:
                self._panel(first, height, panel)

    def _panel(self, first: Expr, height: Expr, panel: Expr) -> None:
        done: Expr = int64(0)
        for tall in HEIGHTS:
            count = emit.bind(T.floordiv(height - done, int64(tall)))
            with loop(count) as block:
                self._block(first, emit.bind(done + block * tall), tall, panel)
            done = emit.bind(done + count * tall)

    def _block(self, first: Expr, start: Expr, height: int, panel: Expr) -> None:
        parts = range(0, PANEL, self.lanes)
        results = [
            [Register(f"float32x{self.lanes}", emit.zeros("float32", self.lanes)) for _ in parts] for _ in range(height)
        ]
        with loop(self.layout.groups) as group:
            for index, column in enumerate(parts):
                self._group(start, panel, group, column, [row[index] for row in results])
        for r in range(height):
            store_panel(self.y, first + start + r, panel * PANEL, self.layout.columns, [one.value for one in results[r]])

    def _group(self, start: Expr, panel: Expr, group: Expr, column: int, results: list[Register]) -> None:
        """Add one group's part to ``results``, a register a row."""
        split = self._split(len(results))
        kind = f"int32x{self.lanes}"
        sums = [[Register(kind, emit.zeros("int32", self.lanes)) for _ in range(split)] for _ in results]
        steps = self.layout.stored_group // self.layout.rows
        whole = steps // STEPS
        before = group * steps
        if whole:
            with loop(whole) as turn:
                for part in range(STEPS):
                    self._step(start, panel, emit.bind(before + turn * STEPS + part), column, sums)
        for part in range(whole * STEPS, steps):
            self._step(start, panel, emit.bind(before + part), column, sums)
        at = [panel, group, int64(column)]
        scale = emit.bind(self.scale.vload(at, f"float32x{self.lanes}"))
        for r, parts in enumerate(sums):
            total = parts[0].value
            for other in parts[1:]:
                total = total + other.value
            row_sum, row_step = self.rounded.sums[start + r, group], self.rounded.steps[start + r, group]
            exact = T.Cast(f"float32x{self.lanes}", total - self._zero(at, row_sum))
            results[r].set(results[r].value + exact * (scale * emit.splat(row_step, self.lanes)))

    def _split(self, height: int) -> int:
        if height > 2:
            return 1
        return 2 if self.layout.stored_group <= _SHORT else 4

    def _step(self, start: Expr, panel: Expr, step: Expr, column: int, sums: list[list[Register]]) -> None:
        unpacked = codes.quads(self.layout, self.w, panel, step, column, self.lanes, signed=self.signed)
        for index, (row, code) in enumerate(unpacked):
            held = emit.bind(code)
            for r, parts in enumerate(sums):
                x = emit.quad_at(self.rounded.codes, [start + r, step * self.layout.rows + row])
                total = parts[index % len(parts)]
                total.set(emit.dot(self.features, total.value, held, emit.splat(x, self.lanes), self.lanes))

    def _zero(self, at: list[Expr], row_sum: Expr) -> Expr:
        """zero * sum x_code, for every column."""
        less = 128 if self.signed else 0
        if self.middle is not None:
            return emit.splat(row_sum * T.int32(self.middle - less), self.lanes)
        zero = T.Cast(f"int32x{self.lanes}", self.zero.vload(at, f"uint8x{self.lanes}"))
        return (zero - emit.splat(T.int32(less), self.lanes)) * emit.splat(row_sum, self.lanes)


def matmul_nbits_int8_dot(layout: CodeLayout, features: Features, middle: int | None, symbol: str) -> Any:
    """x, packed codes, scales[, zero points], y."""
    product = RoundedProduct(layout, features, middle)

    def body(argument: Any, rows: Expr) -> None:
        product.x = argument("x", (rows, layout.depth), "float32")
        product.w = argument("w", layout.shape, "uint8")
        product.scale = argument("scale", layout.scale_shape, "float32")
        if middle is None:
            product.zero = argument("zero", layout.scale_shape, "uint8")
        product.y = argument("y", (rows, layout.columns), "float32")
        product.write(rows)

    return emit.primitive(symbol, body)
