"""Matrix products: linear layers through the seam of ``linears``, and products of activations."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from tvm import tirx

from qcompile.backends.tvm import floats, linears, written
from qcompile.backends.tvm import on_gpu as gpu
from qcompile.backends.tvm.notes import Activation, Rows, Weight
from qcompile.backends.tvm.operation import Operation
from qcompile.backends.tvm.operators.elementwise import elementwise
from qcompile.backends.tvm.operators.rows import in_one_kernel
from qcompile.backends.tvm.operators.shapes import transposed
from qcompile.backends.tvm.scopes import Program, Scope
from qcompile.backends.tvm.tiles import ROWS, Side, tiled
from qcompile.backends.tvm.values import (
    Dim,
    Known,
    Tensor,
    Value,
    aligned,
    broadcast,
    immediate,
    product,
    spelled,
    view,
)

ACTIVATIONS = "products of activations: no integer kernel holds the softmax between them"


def _note(scope: Scope, op: Operation, reason: str = "") -> None:
    if isinstance(scope, Program):
        scope.note(op.where, op.kind, reason)


def _matmul(scope: Scope, op: Operation) -> Value:
    a, b = scope.tensor(op.value(0)), op.value(1)
    if a.rank < 2 or len(b.shape) < 2:
        raise op.unsupported("an operand is a vector")
    if isinstance(scope, Program) and len(b.shape) == 2:
        if isinstance(b, Known):
            scope.note(op.where, "float_linear", "kept in float by the recipe")
            return _flat(scope, a, b.shape[1], lambda x: linears.float_linear(scope, x, scope.constant(b)))
        if isinstance(b.note, Weight):
            return _quantised(scope, a, b, b.note, op.where)
    _note(scope, op, ACTIVATIONS)
    return batched(scope, a, scope.tensor(b), a.dtype)


def _quantised(scope: Program, a: Tensor, b: Tensor, weight: Weight, where: str) -> Tensor:
    if weight.fits and isinstance(a.note, Activation | Rows):
        packed = written.takes_codes(scope, a.note, weight)
        if packed is not None:
            scope.note(where, "matmul_w4a8")
            return _few_bits(scope, a.note, weight, packed)
    if weight.per_column and isinstance(a.note, Activation | Rows):
        return _integer(scope, a, weight, where)
    width = b.shape[1]
    if weight.fits:
        return _flat(scope, a, width, lambda x: linears.weight_only_linear(scope, x, weight, where))
    scope.note(where, "float_linear", "the weight has one scale for each slice that is summed over")
    return _flat(scope, a, width, lambda x: linears.float_linear(scope, x, scope.force(b)))


def _flat(scope: Scope, a: Tensor, width: Dim, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """``apply`` on the rows of ``a`` (..., K) as a matrix."""
    matrix = scope.reshape(a, [product(a.shape[:-1]), a.shape[-1]])
    result, lead = apply(scope.force(matrix)), a.shape[:-1]
    if result.leaf is not None:
        return scope.reshape(result, (*lead, width))
    if a.rank == 2:
        return result

    def place(index: Any) -> Any:
        row: Any = index[0]
        for at, side in zip(index[1:-1], lead[1:], strict=True):
            row = row * side + at
        return row, index[-1]

    return view(result, (*lead, width), place, ("rows", spelled(lead)))


def _few_bits(scope: Program, grid: Activation | Rows, weight: Weight, packed: written.Packed) -> Tensor:
    """Codes times packed codes: the kernel scales its sums."""
    given = [] if isinstance(grid, Activation) else [grid.step, *([] if grid.zero is None else [grid.zero])]
    scales = [scope.force(scope.reshape(value, [product(value.shape)])) for value in given]

    def apply(rows: Tensor) -> Tensor:
        return written.few_bits(scope, rows, grid, scales, weight, packed)

    return _flat(scope, scope.force(grid.codes), weight.matrix.shape[1], apply)


def _integer(scope: Program, a: Tensor, weight: Weight, where: str) -> Tensor:
    """Codes times codes in int32, then one scaling: (x - zx) (W - zw) sx sw."""
    note, codes = a.note, np.ascontiguousarray(weight.matrix)
    depth, width = codes.shape
    scale, zero = (grid[0] for grid in weight.grids())
    if codes.dtype == np.uint8:  # kernels take int8
        codes, zero = (codes.astype(np.int16) - 128).astype(np.int8), zero - 128
    sums = codes.astype(np.int64).sum(axis=0) - depth * zero.astype(np.int64)  # of W - zw
    x = scope.force(note.codes)
    total = _flat(scope, x, width, lambda rows: linears.integer_linear(scope, rows, codes, weight.name, where))
    if zero.any():
        row = elementwise(scope, ("Cast", x.dtype, "int32"), [x], lambda v: tirx.Cast("int32", v), "int32")
        row = scope.reduce("sum", row, [x.rank - 1])
        zeros = Known(zero, "int32", f"{weight.name}.zeros")
        total = elementwise(scope, "less", [total, row, zeros], lambda t, r, z: t - r * z, "int32")
    if isinstance(note, Activation):
        offset = 0 if note.zero is None else int(note.zero.array.reshape(-1)[0])
        shift = Known((sums * offset).astype(np.int32), "int32", f"{weight.name}.offset")
        factor = np.float32(note.scale.array.reshape(-1)[0]) * scale
        both: list[Value] = [total, shift, Known(factor.astype(np.float32), "float32", f"{weight.name}.factor")]
        return elementwise(
            scope, "scaled", both, lambda t, o, s: tirx.Cast("float32", t - o) * s, "float32"
        )
    values: list[Value] = [total, note.step, Known(scale, "float32", f"{weight.name}.scale")]
    if note.zero is not None:
        values += [note.zero, Known(sums.astype(np.int32), "int32", f"{weight.name}.sums")]

    def element(t: Any, step: Any, s: Any, z: Any = None, total_of_column: Any = None) -> Any:
        return tirx.Cast("float32", t if z is None else t - z * total_of_column) * step * s

    return elementwise(scope, ("scaled_rows", note.zero is None), values, element, "float32")


def batched(
    scope: Scope, a: Tensor, b: Tensor, dtype: str, less: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Tensor:
    """a (..., M, K) times b (..., K, N), batches broadcast; ``less``: scalars to be subtracted first."""
    batch = broadcast(a.shape[:-2], b.shape[:-2])
    given = [value for value in less if value is not None]

    def side(number: int, held: Tensor, zero: Tensor | None, place: int) -> Side:
        def element(read: Callable[[int, Any], Any], at: Any, row: Any, column: Any) -> Any:
            found = read(number, (*aligned(held.shape[:-2], at), row, column))
            found = tirx.Cast(dtype, found) if held.dtype != dtype else found
            return found if zero is None else found - tirx.Cast(dtype, read(place, (0,) * zero.rank))

        return element

    sides = side(0, a, less[0], 2), side(1, b, less[1], 2 + (less[0] is not None))
    key = ("matmul", dtype, less[0] is not None, less[1] is not None)
    return _summed(scope, batch, (a.shape[-2], b.shape[-1], a.shape[-1]), dtype, [a, b, *given], sides, key)


def _summed(
    scope: Scope, batch: Sequence[Dim], sizes: tuple[Dim, Dim, Dim], dtype: str, operands: Sequence[Tensor],
    sides: tuple[Side, Side], key: Hashable,
) -> Tensor:  # fmt: skip
    """The product of ``sides``, (*batch, M, N): in tiles where the program wants them and there are columns enough."""
    (left, right), (rows, columns, depth), rank = sides, sizes, len(batch)
    if isinstance(scope, Program) and scope.tiles and not (isinstance(columns, int) and columns < ROWS):
        return tiled(scope, batch, sizes, dtype, operands, left, right, key, pack=True)

    def element(read: Callable[[int, Any], Any], i: Any, k: Any) -> Any:
        return left(read, i[:rank], i[-2], k) * right(read, i[:rank], k, i[-1])

    return scope.contract((*batch, rows, columns), dtype, operands, element, depth, key)


def _matmul_integer(scope: Scope, op: Operation) -> Value:
    a, b = scope.tensor(op.value(0)), op.value(1)
    zeros = [op.value(place) if op.has(place) else None for place in (2, 3)]
    small = [zero is None or (isinstance(zero, Known) and not zero.array.any()) for zero in zeros]
    fixed = zeros[0] is None or (isinstance(zeros[0], Known) and zeros[0].array.size == 1)
    if isinstance(scope, Program) and isinstance(b, Known) and len(b.shape) == 2 and small[1] and fixed:
        name = b.name or "weight"
        found = _flat(scope, a, b.shape[1], lambda x: linears.integer_linear(scope, x, b.array, name, op.where))
        if small[0]:
            return found
        assert isinstance(zeros[0], Known)
        sums = b.array.astype(np.int64).sum(axis=0) * int(zeros[0].array.reshape(-1)[0])
        offset = Known(sums.astype(np.int32), "int32", f"{b.name}.offset")
        return elementwise(scope, "offset", [found, offset], lambda t, o: t - o, "int32")
    taken = gpu.batched(scope, a, scope.tensor(b), zeros) if gpu.is_gpu(scope) else None
    if taken:
        scope.program.note(op.where, "int8_gemm")
        return taken
    if any(zero is not None and product(zero.shape) != 1 for zero, none in zip(zeros, small, strict=True) if not none):
        raise op.unsupported("zero points of rows or columns")
    less = [None if none or zero is None else scope.tensor(zero) for zero, none in zip(zeros, small, strict=True)]
    _note(scope, op)
    return batched(scope, a, scope.tensor(b), "int32", (less[0], less[1]))


def _gemm(scope: Scope, op: Operation) -> Value:
    a, b = scope.tensor(op.value(0)), op.value(1)
    if op.whole("transA"):
        a = transposed(a, [1, 0])
    if op.whole("transB"):
        b = Known(b.array.T, b.dtype, b.name) if isinstance(b, Known) else transposed(b, [1, 0])
    inner = Operation("MatMul", [a, b], {}, 1, op.where)
    found = scope.tensor(_matmul(scope, inner))
    alpha, beta = op.real("alpha", 1.0), op.real("beta", 1.0)
    if alpha != 1.0:
        found = elementwise(
            scope, ("Scale", alpha), [found], lambda v: v * immediate(alpha, found.dtype), found.dtype
        )
    if not op.has(2):
        return found
    return elementwise(
        scope, ("AddScaled", beta), [found, op.value(2)],
        lambda v, c: v + (c if beta == 1.0 else c * immediate(beta, found.dtype)), found.dtype,
    )  # fmt: skip


def _attention(scope: Scope, op: Operation) -> Value:
    """The project's Attention and GroupedAttention: softmax(q k^T scale + bias) v."""
    q, k, v, bias = (scope.tensor(op.value(place)) for place in range(4))
    _note(scope, op, ACTIVATIONS)
    scale, groups = op.real("scale", 1.0), op.whole("groups", 1)
    found = written.attention(scope, q, k, v, bias, scale, groups) if isinstance(scope, Program) else None
    if found is not None:
        return found
    heads, dtype = q.shape[:2], q.dtype

    def head(at: Any) -> Any:
        return at[0], at[1] if groups == 1 else tirx.floordiv(at[1], groups)

    queries: Side = lambda read, at, row, d: read(0, (*at, row, d))  # noqa: E731
    keys: Side = lambda read, at, d, t: read(1, (*head(at), t, d))  # noqa: E731
    values: Side = lambda read, at, t, d: read(1, (*head(at), t, d))  # noqa: E731
    sizes = (q.shape[-2], k.shape[-2], q.shape[-1])
    scores = _summed(scope, heads, sizes, dtype, [q, k], (queries, keys), ("scores", groups))
    weights = _weights(scope, scores, bias, scale)
    sizes = (q.shape[-2], v.shape[-1], k.shape[-2])
    return _summed(scope, heads, sizes, dtype, [weights, v], (queries, values), ("mixed", groups))


def _weights(scope: Scope, scores: Tensor, bias: Tensor, scale: float) -> Tensor:
    def build(inner: Scope, inputs: Sequence[Tensor]) -> list[Tensor]:
        raw, added = inputs
        factor = immediate(scale, raw.dtype)
        biased = inner.force(elementwise(
            inner, ("Biased", scale), [raw, added], lambda a, b: a * factor + b, raw.dtype
        ))  # fmt: skip
        last = [raw.rank - 1]
        top = inner.reduce("max", biased, last)
        grown = inner.force(elementwise(
            inner, "Exp", [biased, top], lambda a, b: floats.exp(a - b, raw.dtype), raw.dtype
        ))  # fmt: skip
        total = inner.reduce("sum", grown, last)
        return [elementwise(inner, "Share", [grown, total], lambda a, b: a / b, raw.dtype)]

    return in_one_kernel(scope, ("weights", scale), [scores, bias], build, "attention_weights")[0]


TABLE: dict[str, Callable[[Scope, Operation], Any]] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul_integer,
}
OWN: dict[str, Callable[[Scope, Operation], Any]] = {
    "Attention": _attention,
    "GroupedAttention": _attention,
}
