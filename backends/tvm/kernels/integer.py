"""x (M, K) int8 or uint8 times W (K, N) int8, exact in int32, with a dot product of quads.

The registers hold 12 rows of two panels; W is read once for them. A dot product takes one unsigned and one signed side
(x86), or two signed ones (ARM, plain): x of the other kind is moved by 128, and the columns' sums take it back:
    sum x w = sum (x + 128) w - 128 sum w            sum x w = sum (x - 128) w + 128 sum w
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qcompile.backends.tvm.kernels import emit
from qcompile.backends.tvm.kernels.emit import Buffer, Expr, Register, T, int64, loop
from qcompile.backends.tvm.kernels.features import PANEL, Features
from qcompile.backends.tvm.kernels.packing import integer_shape

_FLIP = T.int32(-0x7F7F7F80)  # 0x80808080: the highest bit of each byte of a quad


class Product:
    """One kernel while it is written."""

    def __init__(self, k: int, n: int, x_dtype: str, features: Features) -> None:
        self.k, self.n, self.features = k, n, features
        self.lanes = features.lanes
        moved = x_dtype == ("int8" if features.wide else "uint8")
        self.back = (-128 if features.wide else 128) if moved else 0
        self.x: Buffer
        self.w: Buffer
        self.y: Buffer

    def write(self, rows: Expr, heights: Sequence[int]) -> None:
        """All of y: as many blocks of each height as fit, the tallest first."""
        done: Expr = int64(0)
        for height in heights:
            count = emit.bind(T.floordiv(rows - done, int64(height)))
            with loop(integer_shape(self.k, self.n)[0] // 2) as pair, loop(count) as block:
                self._block(done + block * height, height, pair)
            done = emit.bind(done + count * height)

    def _block(self, row: Expr, height: int, pair: Expr) -> None:
        parts = list(self._parts(pair))
        sums = [[Register(f"int32x{self.lanes}", self._start(part)) for part in parts] for _ in range(height)]
        with loop(self.k // 4) as quad:
            self._multiply(sums, parts, quad, [self._x(row + r, quad) for r in range(height)])
        if self.k % 4:
            last = [self._last_x(row + r) for r in range(height)]
            self._multiply(sums, parts, int64(self.k // 4), last)
        for r in range(height):
            self._store(row + r, pair, sums[r])

    def _parts(self, pair: Expr) -> Iterator[tuple[Expr, int]]:
        """(panel, first column in it) of each register along two panels."""
        for panel in range(2):
            for column in range(0, PANEL, self.lanes):
                yield pair * 2 + panel, column

    def _start(self, part: tuple[Expr, int]) -> Expr:
        if not self.back:
            return emit.zeros("int32", self.lanes)
        panel, column = part
        sums = emit.slab_at(self.w, [panel, int64(self.w.shape[1] - 1), int64(column), int64(0)], self.lanes)
        return sums * emit.splat(T.int32(self.back), self.lanes)

    def _multiply(
        self, sums: list[list[Register]], parts: list[tuple[Expr, int]], quad: Expr, x: list[Expr]
    ) -> None:
        weights = [
            emit.bind(emit.slab_at(self.w, [panel, quad, int64(column), int64(0)], self.lanes))
            for panel, column in parts
        ]
        for panel, column in parts:
            emit.prefetch(self.w, panel, quad, int64(column), self.lanes, len(sums))
        for row, value in zip(sums, x, strict=True):
            side = emit.bind(emit.splat(value, self.lanes))
            for total, weight in zip(row, weights, strict=True):
                total.set(emit.dot(self.features, total.value, side, weight, self.lanes))

    def _x(self, row: Expr, quad: Expr) -> Expr:
        return self._moved(emit.quad_at(self.x, [row, quad * 4]))

    def _last_x(self, row: Expr) -> Expr:
        """The quad that K does not fill; what it has too much meets weights of zero."""
        held = emit.stack((4,), str(self.x.dtype))
        for place in range(4):
            inside = place < self.k % 4
            value = self.x[row, self.k - self.k % 4 + place] if inside else T.Cast(str(self.x.dtype), 0)
            emit.store(held, [place], value)
        return self._moved(emit.quad_at(held, [int64(0)]))

    def _moved(self, quad: Expr) -> Expr:
        return quad ^ _FLIP if self.back else quad

    def _store(self, row: Expr, pair: Expr, sums: list[Register]) -> None:
        half = len(sums) // 2
        for panel in range(2):
            values = [total.value for total in sums[panel * half : (panel + 1) * half]]
            column = emit.bind((pair * 2 + panel) * PANEL)
            store_panel(self.y, row, column, self.n, values)


def store_panel(y: Buffer, row: Expr, column: Expr, columns: int, values: list[Expr]) -> None:
    """Write one row of a panel; what lies beyond the last column stays away."""
    with T.If(column + PANEL <= columns):
        with T.Then():
            emit.store_columns(y, row, column, columns, values, whole=True)
        if columns % (2 * PANEL):
            with T.Else():
                emit.store_columns(y, row, column, columns, values, whole=False)


def matmul_integer_dot(k: int, n: int, x_dtype: str, features: Features, symbol: str) -> Any:
    """x (M, K), packed W, y (M, N) int32."""
    product = Product(k, n, x_dtype, features)

    def body(argument: Any, rows: Expr) -> None:
        product.x = argument("x", (rows, k), x_dtype)
        product.w = argument("w", integer_shape(k, n), "int8")
        product.y = argument("y", (rows, n), "int32")
        product.write(rows, (12, 4, 1) if features.wide else (4, 1) if features.unit == "plain" else (3, 1))

    return emit.primitive(symbol, body)
