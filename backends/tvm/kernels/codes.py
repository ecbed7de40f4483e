"""Reading packed codes: from slabs of memory to quads or lanes of codes in registers."""

from __future__ import annotations

from collections.abc import Iterator

from qcompile.backends.tvm.kernels import emit
from qcompile.backends.tvm.kernels.emit import Buffer, Expr, T, int64
from qcompile.backends.tvm.kernels.packing import CodeLayout

_SIGN = -0x7F7F7F80  # 0x80808080


def quads(
    layout: CodeLayout, packed: Buffer, panel: Expr, step: Expr, column: int, lanes: int, *, rows: int, signed: bool
) -> Iterator[tuple[int, Expr]]:
    """(first row in the step, quads of ``lanes`` columns from ``column`` on) of ``layout.rows`` rows.

    rows: of x that they meet
    signed: codes of 8 bits come less 128, for a dot product that takes no unsigned side
    """
    held = slabs(layout, packed, panel, step, column, lanes, rows)
    for quad in range(layout.rows // 4):
        yield 4 * quad, _quad(layout.bits, held, quad, lanes, signed)


def slabs(
    layout: CodeLayout, packed: Buffer, panel: Expr, step: Expr, column: int, lanes: int, rows: int
) -> list[Expr]:
    """The slabs of a step as int32 registers. ``rows``: of x that they meet."""
    first = step * layout.slabs
    emit.prefetch(packed, panel, first, int64(column), lanes, rows)
    return [
        emit.bind(emit.slab_at(packed, [panel, first + slab, int64(column), int64(0)], lanes))
        for slab in range(layout.slabs)
    ]


def _quad(bits: int, held: list[Expr], quad: int, lanes: int, signed: bool) -> Expr:
    if bits == 8:
        return held[0] ^ emit.splat(T.int32(_SIGN), lanes) if signed else held[0]
    if bits == 3:
        low = _shifted(held[quad // 4], 2 * (quad % 4), lanes) & _bytes(3, lanes)
        high = _shifted(held[2], quad - 2, lanes) & _bytes(4, lanes)
        return low | high
    return _shifted(held[0], bits * quad, lanes) & _bytes(2**bits - 1, lanes)


def lane_code(bits: int, held: list[Expr], row: int, lanes: int) -> Expr:
    """The codes of row ``row`` of a step, int32; above them, bits of other codes. 3 bits: nothing above."""
    quad, place = row // 4, row % 4
    if bits == 3:
        low = _shifted(held[quad // 4], 2 * (quad % 4) + 8 * place, lanes) & emit.splat(T.int32(3), lanes)
        high = _shifted(held[2], quad + 8 * place - 2, lanes) & emit.splat(T.int32(4), lanes)
        return low | high
    return _shifted(held[0], bits * quad + 8 * place, lanes)


def _shifted(value: Expr, right: int, lanes: int) -> Expr:
    if right == 0:
        return value
    return value >> emit.splat(T.int32(right), lanes) if right > 0 else value << emit.splat(T.int32(-right), lanes)


def _bytes(mask: int, lanes: int) -> Expr:
    return emit.splat(T.int32(mask * 0x01010101), lanes)
