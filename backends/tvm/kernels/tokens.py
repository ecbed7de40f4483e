"""Rounding rows of x to 8 bits inside a kernel, in blocks along K: what ``numerics.quantize`` does with them.

    step = max(max |x| / 127, the smallest normal number),  code = rint(x / step)
"""

from __future__ import annotations

import dataclasses

from qcompile.backends.tvm.kernels import emit
from qcompile.backends.tvm.kernels.emit import Buffer, Expr, Register, T, int64, loop
from qcompile.backends.tvm.kernels.features import PANEL
from qcompile.backends.tvm.kernels.packing import CodeLayout
from qcompile.quant.numerics import SCALE_FLOOR

LEVELS = 127


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Codes int8 (rows, depth), steps float32 (rows, blocks) and sums of codes int32 (rows, blocks), on the stack."""

    codes: Buffer
    steps: Buffer
    sums: Buffer


def memory(rows: int, layout: CodeLayout) -> Rounded:
    return Rounded(
        emit.stack((rows, layout.stored_depth), "int8"),
        emit.stack((rows, layout.groups), "float32"),
        emit.stack((rows, layout.groups), "int32"),
    )


def round_row(x: Buffer, row: Expr, into: Rounded, place: Expr, layout: CodeLayout) -> None:
    """Row ``row`` of x into row ``place``."""
    whole = layout.depth // layout.stored_group
    if whole:
        with loop(whole) as block:
            _round_block(x, row, into, place, block, layout, layout.stored_group)
    if layout.depth % layout.stored_group:
        _round_block(x, row, into, place, int64(whole), layout, layout.depth % layout.stored_group)


def _round_block(
    x: Buffer, row: Expr, into: Rounded, place: Expr, block: Expr, layout: CodeLayout, length: int
) -> None:
    start = emit.bind(block * layout.stored_group)
    vectors, rest = length // PANEL, length % PANEL
    top = Register(f"float32x{PANEL}", emit.zeros("float32", PANEL))
    with loop(vectors) as index:
        top.set(T.max(top.value, T.abs(x.vload([row, start + index * PANEL], f"float32x{PANEL}"))))
    largest = Register("float32", emit.pure("float32", "llvm.vector.reduce.fmax", top.value))
    with loop(rest) as index:
        largest.set(T.max(largest.value, T.abs(x[row, start + (vectors * PANEL + index)])))
    step = emit.bind(T.max(largest.value / T.float32(LEVELS), T.float32(SCALE_FLOOR)))
    total = Register(f"int32x{PANEL}", emit.zeros("int32", PANEL))
    with loop(vectors) as index:
        found = emit.bind(_codes(x.vload([row, start + index * PANEL], f"float32x{PANEL}"), step, PANEL))
        total.set(total.value + found)
        emit.store(into.codes, [place, emit.ramp(start + index * PANEL, PANEL)], T.Cast(f"int8x{PANEL}", found))
    tail = Register("int32", emit.pure("int32", "llvm.vector.reduce.add", total.value))
    with loop(rest) as index:
        code = emit.bind(_codes(x[row, start + (vectors * PANEL + index)], step, 1))
        tail.set(tail.value + code)
        emit.store(into.codes, [place, start + (vectors * PANEL + index)], T.Cast("int8", code))
    if length < layout.stored_group:
        with loop(layout.stored_group - length) as index:
            emit.store(into.codes, [place, start + length + index], T.int8(0))
    emit.store(into.steps, [place, block], step)
    emit.store(into.sums, [place, block], tail.value)


def _codes(x: Expr, step: Expr, lanes: int) -> Expr:
    steps = T.nearbyint(x / emit.splat(step, lanes))
    bound = T.float32(LEVELS)
    held = T.max(T.min(steps, emit.splat(bound, lanes)), emit.splat(-bound, lanes))
    return T.Cast(f"int32x{lanes}" if lanes > 1 else "int32", held)
