"""Kernels that only read, or only multiply: what this processor reaches at best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qcompile.backends.tvm.kernels import emit
from qcompile.backends.tvm.kernels.amx import ask_for_tiles, configure, release
from qcompile.backends.tvm.kernels.emit import Buffer, Expr, Register, T, int64, loop
from qcompile.backends.tvm.kernels.features import Features

LANES = 16
STREAMS = 8  # registers of 64 bytes that are read in one turn
TURNS = 4096
_TILE_OPERATIONS = 2 * 16 * 16 * 64
_DOTS = 20  # independent sums; a product waits for the one before it on the same sum


def reading(size: int, symbol: str = "reading") -> Any:
    """(data int32 (rows, 16), total int32 (rows of 1, 16)): the sum of ``size`` bytes."""
    lines = size // (4 * LANES) // STREAMS

    def body(argument: Callable[..., Buffer], rows: Expr) -> None:
        data = argument("data", (lines * STREAMS, LANES), "int32")
        total = argument("total", (rows, LANES), "int32")
        sums = [Register(f"int32x{LANES}", emit.zeros("int32", LANES)) for _ in range(STREAMS)]
        with loop(lines) as line:
            for index, one in enumerate(sums):
                one.set(one.value + data.vload([line * STREAMS + index, int64(0)], f"int32x{LANES}"))
        value = sums[0].value
        for one in sums[1:]:
            value = value + one.value
        emit.store(total, [int64(0), emit.ramp(int64(0), LANES)], value)

    return emit.primitive(symbol, body)


def multiplying(features: Features, symbol: str = "multiplying") -> tuple[Any, float]:
    """(seed int32 (1, 16), total int32 (M, 16)), and the integer operations that it does: products from registers."""
    if features.unit == "amx":
        return _tiles(symbol), 4.0 * TURNS * _TILE_OPERATIONS
    lanes = features.lanes

    def body(argument: Callable[..., Buffer], rows: Expr) -> None:
        seed = argument("seed", (1, LANES), "int32")
        total = argument("total", (rows, LANES), "int32")
        side = emit.bind(seed.vload([int64(0), int64(0)], f"int32x{lanes}"))
        sums = [Register(f"int32x{lanes}", emit.zeros("int32", lanes)) for _ in range(_DOTS)]
        with loop(TURNS):
            for one in sums:
                one.set(emit.dot(features, one.value, side, side, lanes))
        value = sums[0].value
        for one in sums[1:]:
            value = value + one.value
        emit.store(total, [int64(0), emit.ramp(int64(0), lanes)], value)

    return emit.primitive(symbol, body), 2.0 * TURNS * _DOTS * lanes * 4


def _tiles(symbol: str) -> Any:
    def body(argument: Callable[..., Buffer], rows: Expr) -> None:
        argument("seed", (1, LANES), "int32")
        argument("total", (rows, LANES), "int32")
        ask_for_tiles()
        configure(int64(16), int64(16))
        for tile in range(8):
            emit.effect("llvm.x86.tilezero", T.uint8(tile))
        with loop(TURNS):
            for tile in range(4):
                emit.effect("llvm.x86.tdpbusd", *(T.uint8(t) for t in (tile, 4 + tile // 2, 6 + tile % 2)))
        release()

    return emit.primitive(symbol, body)
