"""x (M, K) int8 or uint8 times W (K, N) int8, exact in int32, on the tiles of AMX.

A tile has 16 rows of 64 bytes. Two tiles of x (32 rows) meet two panels of W (32 columns) in four tiles of sums; 128
rows of x stay in the cache while W passes once. Tiles of the last rows are configured with fewer rows, so that none is
read or written outside; the end of a row of x that does not fill 64 bytes is copied and filled with zeros first.
Linux gives tiles to a process that asks: the kernel asks at every call (0.1 microseconds).
"""

from __future__ import annotations

from typing import Any

from qcompile.backends.tvm.kernels import emit
from qcompile.backends.tvm.kernels.emit import Buffer, Expr, T, address, int64, loop, when
from qcompile.backends.tvm.kernels.features import PANEL
from qcompile.backends.tvm.kernels.packing import TILE_DEPTH, integer_shape

ROWS = 16  # of a tile
CHUNK = 128  # rows of x that stay in the cache
_SUMS, _X, _W = (0, 2), (4, 5), (6, 7)  # tile numbers; sums of row tile i and panel j: _SUMS[i] + j
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18  # x86-64 Linux


class TileProduct:
    """One kernel while it is written."""

    def __init__(self, k: int, n: int, x_dtype: str) -> None:
        self.k, self.n = k, n
        self.intrinsic = "llvm.x86.tdpbusd" if x_dtype == "uint8" else "llvm.x86.tdpbssd"
        self.x: Buffer
        self.w: Buffer
        self.y: Buffer
        self.rest: Buffer

    def write(self, rows: Expr) -> None:
        ask_for_tiles()
        if self.k % TILE_DEPTH:
            self.rest = emit.cleared_stack((CHUNK, TILE_DEPTH), str(self.x.dtype))
        with loop(T.floordiv(rows + (CHUNK - 1), int64(CHUNK))) as chunk:
            first = emit.bind(chunk * CHUNK)
            height = emit.bind(T.min(int64(CHUNK), rows - first))
            if self.k % TILE_DEPTH:
                self._copy_rest(first, height)
            blocks = emit.bind(T.floordiv(height, int64(2 * ROWS)))
            with when(blocks > 0):
                configure(int64(ROWS), int64(ROWS))
                with loop(self.w.shape[0] // 2) as pair, loop(blocks) as block:
                    self._block(first, block * (2 * ROWS), 2, pair, int64(ROWS))
            self._last_rows(first, blocks * (2 * ROWS), height)
        release()

    def _last_rows(self, first: Expr, start: Expr, height: Expr) -> None:
        left = emit.bind(height - start)
        for tiles in (1, 2):
            low = (tiles - 1) * ROWS
            with when(T.And(left > low, left <= low + ROWS)):
                configure(*((left, left) if tiles == 1 else (int64(ROWS), left - ROWS)))
                with loop(self.w.shape[0] // 2) as pair:
                    self._block(first, start, tiles, pair, left - low)

    def _copy_rest(self, first: Expr, height: Expr) -> None:
        start = self.k - self.k % TILE_DEPTH
        with loop(height) as row, loop(self.k % TILE_DEPTH) as place:
            emit.store(self.rest, [row, place], self.x[first + row, start + place])

    def _block(self, first: Expr, start: Expr, tiles: int, pair: Expr, last_height: Expr) -> None:
        """Rows first + start .. of up to two tiles, and a pair of panels."""
        for i in range(tiles):
            for j in range(2):
                emit.effect("llvm.x86.tilezero", T.uint8(_SUMS[i] + j))
        with loop(self.k // TILE_DEPTH) as step:
            for i in range(tiles):
                load(_X[i], self.x, [first + start + i * ROWS, step * TILE_DEPTH], self.k)
            self._multiply(tiles, pair, step)
        if self.k % TILE_DEPTH:
            for i in range(tiles):
                load(_X[i], self.rest, [start + i * ROWS, int64(0)], TILE_DEPTH)
            self._multiply(tiles, pair, int64(self.k // TILE_DEPTH))
        for i in range(tiles):
            height = last_height if i == tiles - 1 else int64(ROWS)
            for j in range(2):
                self._store(_SUMS[i] + j, first + start + i * ROWS, height, (pair * 2 + j) * PANEL)

    def _multiply(self, tiles: int, pair: Expr, step: Expr) -> None:
        for j in range(2):
            load(_W[j], self.w, [pair * 2 + j, step * ROWS, int64(0), int64(0)], 4 * PANEL)
        for i in range(tiles):
            for j in range(2):
                emit.effect(self.intrinsic, *(T.uint8(tile) for tile in (_SUMS[i] + j, _X[i], _W[j])))

    def _store(self, tile: int, row: Expr, height: Expr, column: Expr) -> None:
        """A tile of sums; where the last column lies inside it, through a copy."""
        with T.If(column + PANEL <= self.n):
            with T.Then():
                emit.effect("llvm.x86.tilestored64", T.uint8(tile), address(self.y, [row, column]), int64(4 * self.n))
            if self.n % (2 * PANEL):
                with T.Else():
                    held = emit.cleared_stack((ROWS, PANEL), "int32")
                    emit.effect(
                        "llvm.x86.tilestored64", T.uint8(tile), address(held, [int64(0), int64(0)]), int64(4 * PANEL)
                    )
                    with loop(height) as r, loop(T.max(int64(self.n) - column, int64(0))) as c:
                        emit.store(self.y, [row + r, column + c], held[r, c])


def ask_for_tiles() -> None:
    """Linux's permission to use the tiles; a RuntimeError where it is refused."""
    refused = emit.bind(T.call_extern("int64", "syscall", int64(_ARCH_PRCTL), int64(_REQUEST), int64(_TILE_DATA)))
    with T.Assert(refused == 0, "AMX tiles are refused here: compile for a target without +amx-int8"):
        pass


def configure(first: Expr, second: Expr) -> None:
    """Tiles of x and of sums with ``first`` and ``second`` rows, tiles of W with 16."""
    place = emit.cleared_stack((1, 64), "uint8")
    emit.store(place, [0, 0], T.uint8(1))
    for tile in range(8):
        emit.store(place, [0, 16 + 2 * tile], T.uint8(64))
    heights = [first, first, second, second, first, second, int64(ROWS), int64(ROWS)]
    for tile, height in enumerate(heights):
        emit.store(place, [0, 48 + tile], T.Cast("uint8", height))
    emit.effect("llvm.x86.ldtilecfg", address(place, [0, 0]))


def release() -> None:
    """Leave no configuration behind: after one for a single row, a product of ONNX Runtime in the process was wrong.

    Why is not proven; that it keeps a configuration whose tiles are as wide as its own would explain it.
    """
    emit.effect("llvm.x86.tilerelease")


def load(tile: int, buffer: Buffer, indices: list[Expr], stride: int) -> None:
    emit.effect("llvm.x86.tileloadd64", T.uint8(tile), address(buffer, indices), int64(stride))


def matmul_integer_amx(k: int, n: int, x_dtype: str, symbol: str) -> Any:
    """x (M, K), packed W, y (M, N) int32."""
    product = TileProduct(k, n, x_dtype)

    def body(argument: Any, rows: Expr) -> None:
        product.x = argument("x", (rows, k), x_dtype)
        product.w = argument("w", integer_shape(k, n), "int8")
        product.y = argument("y", (rows, n), "int32")
        product.write(rows)

    return emit.primitive(symbol, body)
