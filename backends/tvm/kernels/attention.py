"""softmax(scale q k^T + bias) v in one pass over the keys: no scores are kept, and nothing of the cache is copied.

    q (B, H, S, D), k (B, H / groups, T, D), v (B, H / groups, T, E), bias broadcast to (B, H, S, T), y (B, H, S, E)
A row of q goes through the keys in chunks. What came before a chunk with a larger score is scaled down to it
(arXiv 1805.02867). Sixteen keys are multiplied at once; a tree of permutations sums their lanes into one register.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qcompile.backends.tvm import floats
from qcompile.backends.tvm.kernels import emit
from qcompile.backends.tvm.kernels.emit import Buffer, Expr, Register, T, int64, loop, when

LANES = 16
CHUNK = 64  # keys whose scores are held
_KIND = f"float32x{LANES}"
_LOWEST = -3.4028234663852886e38


class AttentionProduct:
    """One kernel while it is written. ``stretched``: which sides of the bias are 1 and stand for all."""

    def __init__(
        self, heads: int, groups: int, depth: int, width: int, scale: float, stretched: Sequence[bool]
    ) -> None:
        self.heads, self.groups, self.depth, self.width = heads, groups, depth, width
        self.scale, self.stretched = scale, stretched
        self.q: Buffer
        self.k: Buffer
        self.v: Buffer
        self.bias: Buffer
        self.y: Buffer
        self.nought: Register

    def primitive(self, symbol: str) -> Any:
        def body(argument: Callable[..., Buffer], batch: Expr) -> None:
            rows, keys = T.int64(), T.int64()
            held = self.heads // self.groups
            sides = [1 if one else side for one, side in zip(
                self.stretched, (batch, self.heads, rows, keys), strict=True
            )]  # fmt: skip
            self.q = argument("q", (batch, self.heads, rows, self.depth), "float32")
            self.k = argument("k", (batch, held, keys, self.depth), "float32")
            self.v = argument("v", (batch, held, keys, self.width), "float32")
            self.bias = argument("bias", sides, "float32")
            self.y = argument("y", (batch, self.heads, rows, self.width), "float32")
            with T.parallel(int64(0), batch * self.heads) as place:
                head = [emit.bind(T.floordiv(place, int64(self.heads))), emit.bind(place % self.heads)]
                with loop(rows) as row:
                    self._row([*head, row], keys)

        return emit.primitive(symbol, body)

    def _row(self, at: list[Expr], keys: Expr) -> None:
        """One row of y; ``at``: batch, head, row."""
        scale = emit.splat(T.float32(self.scale), LANES)
        q = [emit.bind(self.q.vload([*at, int64(d)], _KIND) * scale) for d in range(0, self.depth, LANES)]
        sums = [Register(_KIND, emit.zeros("float32", LANES)) for _ in range(0, self.width, LANES)]
        self.nought = Register(_KIND, emit.zeros("float32", LANES))
        top, total = Register("float32", T.float32(_LOWEST)), Register(_KIND, emit.zeros("float32", LANES))
        held = emit.stack((CHUNK,), "float32")
        with loop(T.floordiv(keys + (CHUNK - 1), int64(CHUNK))) as chunk:
            start = emit.bind(chunk * CHUNK)
            count = emit.bind(T.min(int64(CHUNK), keys - start))
            high = Register(_KIND, emit.splat(T.float32(_LOWEST), LANES))
            with loop(T.floordiv(count, int64(LANES))) as part:
                first = emit.bind(part * LANES)
                self._scores(at, q, start + first, held, first, (high, total), None)
            with when(count % LANES > 0):
                first = emit.bind(T.floordiv(count, int64(LANES)) * LANES)
                self._scores(at, q, start + first, held, first, (high, total), keys)
            best = emit.bind(T.max(top.value, emit.pure("float32", "llvm.vector.reduce.fmax", high.value)))
            less = emit.bind(_exp(emit.splat(top.value - best, LANES)))
            top.set(best)
            for one in (total, *sums):
                one.set(one.value * less)
            with loop(T.floordiv(count + (LANES - 1), int64(LANES))) as part:
                share = emit.bind(_exp(held.vload([part * LANES], _KIND) - emit.splat(best, LANES)))
                emit.store(held, [emit.ramp(part * LANES, LANES)], share)
                total.set(total.value + share)
            with loop(count) as key:
                share = emit.bind(emit.splat(held[key], LANES))
                for index, one in enumerate(sums):
                    value = self.v.vload([*self._of(at), start + key, int64(index * LANES)], _KIND)
                    one.set(emit.pure(_KIND, "llvm.fmuladd", share, value, one.value))
        whole = emit.pure("float32", "llvm.vector.reduce.fadd", T.float32(0), total.value)
        whole = emit.bind(emit.splat(whole, LANES))
        for index, one in enumerate(sums):
            emit.store(self.y, [*at, emit.ramp(int64(index * LANES), LANES)], one.value / whole)

    def _of(self, at: list[Expr]) -> list[Expr]:
        """Batch and head of the keys and values."""
        return [at[0], T.floordiv(at[1], int64(self.groups))]

    def _scores(
        self, at: list[Expr], q: list[Expr], key: Expr, held: Buffer, first: Expr, into: tuple[Register, Register],
        keys: Expr | None,
    ) -> None:  # fmt: skip
        """16 scores from ``key`` on, at ``first`` of ``held``; their maximum, and a NaN where one is no number.

        ``keys``: how many there are, where not 16 are left
        """
        high, total = into
        parts = []
        for lane in range(LANES):
            place = key + lane if keys is None else T.min(key + lane, keys - 1)
            row = [self.k.vload([*self._of(at), place, int64(d * LANES)], _KIND) for d in range(len(q))]
            product = row[0] * q[0]
            for value, factor in zip(row[1:], q[1:], strict=True):
                product = emit.pure(_KIND, "llvm.fmuladd", value, factor, product)
            parts.append(emit.bind(product))
        raw = emit.bind(_across(parts))
        total.set(emit.pure(_KIND, "llvm.fmuladd", raw, self.nought.value, total.value))
        found = emit.bind(raw + self._bias(at, key, keys))
        if keys is not None:
            inside = emit.ramp(T.Cast("int32", key), LANES) < emit.splat(T.Cast("int32", keys), LANES)
            found = emit.bind(T.Select(inside, found, emit.splat(T.float32(float("-inf")), LANES)))
        emit.store(held, [emit.ramp(first, LANES)], found)
        high.set(T.max(high.value, found))

    def _bias(self, at: list[Expr], key: Expr, keys: Expr | None) -> Expr:
        batch, head, row, _ = (int64(0) if one else place for one, place in zip(
            self.stretched, (*at, key), strict=True
        ))  # fmt: skip
        if self.stretched[3]:
            return emit.splat(self.bias[batch, head, row, int64(0)], LANES)
        if keys is None:
            return self.bias.vload([batch, head, row, key], _KIND)
        copied = emit.stack((LANES,), "float32")
        for lane in range(LANES):
            emit.store(copied, [lane], self.bias[batch, head, row, T.min(key + lane, keys - 1)])
        return copied.vload([int64(0)], _KIND)


def _exp(x: Expr) -> Expr:
    return floats.exp_lanes(emit.bind(x), LANES)


def _across(parts: list[Expr]) -> Expr:
    """The sum of the lanes of each of 16 registers, in the lanes of one."""
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [_folded(a, b, half) for a, b in zip(parts[:half], parts[half:], strict=True)]
    return parts[0]


def _folded(a: Expr, b: Expr, width: int) -> Expr:
    """Runs of 2 ``width`` lanes of ``a`` and of ``b``, each folded to its half, in turns."""
    starts = range(0, LANES, 2 * width)
    low = [start + other * LANES + lane for start in starts for other in (0, 1) for lane in range(width)]
    sides = ([T.int32(place + shift) for place in low] for shift in (0, width))
    left, right = (T.Shuffle([a, b], side) for side in sides)
    return emit.bind(left + right)
