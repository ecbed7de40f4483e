"""Operators that pick or join elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx

from qcompile.backends.tvm import written
from qcompile.backends.tvm.operation import Operation, rank_of
from qcompile.backends.tvm.operators.shapes import dims_known
from qcompile.backends.tvm.scopes import Program, Scope
from qcompile.backends.tvm.values import Dim, Known, Tensor, Value, expression, immediate, simplified, spelled, view

_FAR = 2**31 - 1
CHEAP = 1  # of the cost of a tensor that is joined: more is computed beforehand, away from the branches


def _whole(value: Any) -> Any:
    """An index as int64."""
    if isinstance(value, int):
        return value
    return value if str(value.ty) == "int64" else tirx.Cast("int64", value)


def _from_end(index: Any, side: Dim, dtype: str) -> Any:
    """``index``, counted from the end where it is negative."""
    if isinstance(index, int):
        return index if index >= 0 else index + side
    wide = _whole(index)
    return wide if dtype.startswith("uint") else tirx.Select(wide < 0, wide + immediate(side, "int64"), wide)


def _gather(scope: Scope, op: Operation) -> Value:
    data, indices, axis = op.value(0), op.value(1), op.whole("axis") % max(1, rank_of(op.value(0)))
    if isinstance(data, Known) and isinstance(indices, Known) and not indices.is_symbolic:
        return Known(np.asarray(np.take(data.array, indices.array.astype(np.int64), axis)), data.dtype)
    held = scope.tensor(data)
    before, after = held.shape[:axis], held.shape[axis + 1 :]
    if isinstance(indices, Known) and indices.array.size == 1:
        at = _from_end(indices.ints()[0], held.shape[axis], indices.dtype)
        at = immediate(at, "int64")
        shape = (*before, *indices.shape, *after)
        wide = len(indices.shape)
        return view(
            held, shape, lambda i: (*i[:axis], at, *i[axis + wide :]), ("Pick", axis, wide, str(at), len(shape))
        )
    places = scope.tensor(indices)
    if places.cost and places.leaf is None:
        places = scope.force(places)
    wide, side = places.rank, held.shape[axis]

    def make(read: Callable[[int, Any], Any], index: Any) -> Any:
        at = _from_end(read(1, index[axis : axis + wide]), side, places.dtype)
        return read(0, (*index[:axis], at, *index[axis + wide :]))

    return expression((*before, *places.shape, *after), held.dtype, [held, places], make, ("Gather", axis))


def _gather_elements(scope: Scope, op: Operation) -> Value:
    held, places = scope.tensor(op.value(0)), scope.tensor(op.value(1))
    axis = op.whole("axis") % held.rank
    side = held.shape[axis]

    def make(read: Callable[[int, Any], Any], index: Any) -> Any:
        at = _from_end(read(1, index), side, places.dtype)
        return read(0, (*index[:axis], at, *index[axis + 1 :]))

    return expression(places.shape, held.dtype, [held, places], make, ("GatherElements", axis))


def _gather_nd(scope: Scope, op: Operation) -> Value:
    held, places = scope.tensor(op.value(0)), scope.tensor(op.value(1))
    batch, depth = op.whole("batch_dims"), places.shape[-1]
    if not isinstance(depth, int):
        raise op.unsupported("its indices have a dynamic depth")
    rank, shape = places.rank - 1, (*places.shape[:-1], *held.shape[batch + depth :])
    sides = held.shape[batch : batch + depth]

    def make(read: Callable[[int, Any], Any], index: Any) -> Any:
        at = [_from_end(read(1, (*index[:rank], n)), sides[n], places.dtype) for n in range(depth)]
        return read(0, (*index[:batch], *at, *index[rank:]))

    return expression(shape, held.dtype, [held, places], make, ("GatherND", batch, depth))


def _slice(scope: Scope, op: Operation) -> Value:
    x = op.value(0)
    rank = rank_of(x)
    starts, ends = (op.dims(1), op.dims(2)) if op.has(1) else (op.ints("starts") or [], op.ints("ends") or [])
    axes = op.axes(rank, 3) or list(range(len(starts)))
    steps = op.dims(4) if op.has(4) else [1] * len(starts)
    fixed = all(isinstance(value, int) for value in (*starts, *ends, *steps))
    if isinstance(x, Known) and not fixed:
        x = scope.constant(x)
    if isinstance(x, Known):
        cut = [slice(None)] * rank
        for axis, first, last, step in zip(axes, starts, ends, steps, strict=True):
            cut[axis] = slice(int(first), None if int(last) <= -_FAR else int(last), int(step))
        return Known(np.asarray(x.array[tuple(cut)]), x.dtype)
    shape: list[Dim] = list(x.shape)
    begin: list[Any] = [0] * rank
    stride = [1] * rank
    for axis, first, last, step in zip(axes, starts, ends, steps, strict=True):
        if not isinstance(step, int) or step < 1:
            raise op.unsupported(f"its step is {step}")
        low, high = _bound(first, x.shape[axis]), _bound(last, x.shape[axis])
        shape[axis] = simplified(-((low - high) // step))
        begin[axis], stride[axis] = low, step

    def place(index: Any) -> Any:
        return tuple(at * s + b if s != 1 else at + b for at, b, s in zip(index, begin, stride, strict=True))

    return view(x, shape, place, ("Slice", spelled(begin), tuple(stride), spelled(shape)))


def _bound(value: Dim, side: Dim) -> Dim:
    """Where a slice begins or ends, within ``side``."""
    if not isinstance(value, int):
        return simplified(value)
    if value >= _FAR:
        return side
    if value < 0:
        value = side + value
        return max(value, 0) if isinstance(value, int) else simplified(tirx.max(value, immediate(0, "int64")))
    if isinstance(side, int):
        return min(value, side)
    return 0 if value == 0 else simplified(tirx.min(immediate(value, "int64"), side))


def _concat(scope: Scope, op: Operation) -> Value:
    values = [op.value(place) for place in range(len(op.inputs))]
    axis = op.whole("axis") % rank_of(values[0])
    if all(isinstance(value, Known) for value in values):
        arrays = [value.array for value in values if isinstance(value, Known)]
        if any(array.dtype == object for array in arrays):
            dims = [dim for value in values if isinstance(value, Known) for dim in value.ints()]
            return dims_known(dims, values[0].dtype)
        return Known(np.concatenate(arrays, axis), values[0].dtype)
    parts = [scope.tensor(value) for value in values]
    found = written.grown(scope, parts, axis) if isinstance(scope, Program) else None
    if found is not None:
        return found
    parts = [scope.force(part) if part.cost > CHEAP else part for part in parts]
    return joined(parts, axis)


def joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """The tensors one after the other; nothing of one is read for an element of another."""
    ends: list[Dim] = [0]
    for part in parts:
        ends.append(simplified(ends[-1] + part.shape[axis]))

    def make(read: Callable[[int, Any], Any], index: Any) -> Any:
        found = None
        for n in range(len(parts) - 1, -1, -1):
            start = ends[n]
            at = index[axis] if isinstance(start, int) and start == 0 else index[axis] - start
            element = read(n, (*index[:axis], at, *index[axis + 1 :]))
            found = element if found is None else tirx.if_then_else(index[axis] < ends[n + 1], element, found)
        return found

    shape = list(parts[0].shape)
    shape[axis] = ends[-1]
    return expression(shape, parts[0].dtype, parts, make, ("Concat", axis, spelled(ends)))


def _split(scope: Scope, op: Operation) -> Sequence[Value]:
    x = op.value(0)
    axis = op.whole("axis") % rank_of(x)
    side = x.shape[axis]
    if op.has(1) or op.ints("split") is not None:
        sizes = op.dims(1) if op.has(1) else list(op.ints("split") or [])
    else:
        if not isinstance(side, int):
            raise op.unsupported("it splits a dynamic dim")
        count = op.whole("num_outputs", op.outputs)
        each = -(-side // count)
        sizes = [each] * (count - 1) + [side - each * (count - 1)]
    found: list[Value] = []
    start: Dim = 0
    for size in sizes:
        found.append(_part(x, axis, start, size))
        start = simplified(start + size)
    return found


def _part(x: Value, axis: int, start: Dim, size: Dim) -> Value:
    if isinstance(x, Known):
        return Known(x.array[(slice(None),) * axis + (slice(int(start), int(start + size)),)], x.dtype)
    shape = list(x.shape)
    shape[axis] = size
    return view(
        x, shape, lambda i: (*i[:axis], i[axis] + start, *i[axis + 1 :]), ("Part", axis, str(start), str(size))
    )


def _trilu(scope: Scope, op: Operation) -> Value:
    x, upper = scope.tensor(op.value(0)), bool(op.whole("upper", 1))
    diagonal = op.dims(1)[0] if op.has(1) else 0

    def make(read: Callable[[int, Any], Any], index: Any) -> Any:
        distance = index[-1] - index[-2]
        inside = distance >= diagonal if upper else distance <= diagonal
        return tirx.Select(inside, read(0, index), immediate(0, x.dtype))

    return expression(x.shape, x.dtype, [x], make, ("Trilu", upper, str(diagonal)), 1)


TABLE = {
    "Concat": _concat,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Slice": _slice,
    "Split": _split,
    "Trilu": _trilu,
}
