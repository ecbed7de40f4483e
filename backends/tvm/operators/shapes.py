"""Operators on shapes, and those that give a tensor another shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from qcompile.backends.tvm.operation import Operation, rank_of
from qcompile.backends.tvm.scopes import Scope
from qcompile.backends.tvm.values import (
    Dim,
    Known,
    Tensor,
    Value,
    aligned,
    broadcast,
    expression,
    immediate,
    product,
    simplified,
    spelled,
    view,
)


def dims_known(dims: Sequence[Dim], dtype: str = "int64") -> Known:
    """A vector of dims."""
    if any(isinstance(dim, tirx.Expr) for dim in dims):
        array = np.empty(len(dims), object)
        array[:] = list(dims)
        return Known(array, dtype)
    return Known(np.array([int(dim) for dim in dims], dtype), dtype)


def _shape(scope: Scope, op: Operation) -> Value:
    shape = list(op.value(0).shape)
    end = op.attributes.get("end")
    return dims_known(shape[op.whole("start") : None if end is None else int(end)])


def _size(scope: Scope, op: Operation) -> Value:
    found = dims_known([product(list(op.value(0).shape))])
    return Known(found.array.reshape(()), "int64")


def _target(op: Operation, shape: Sequence[Dim], wanted: Sequence[Dim]) -> list[Dim]:
    """``wanted`` with 0 and -1 filled in."""
    keep = not op.whole("allowzero")
    found = [shape[i] if keep and isinstance(d, int) and d == 0 else d for i, d in enumerate(wanted)]
    if -1 not in [d for d in found if isinstance(d, int)]:
        return [simplified(d) for d in found]
    place = next(i for i, d in enumerate(found) if isinstance(d, int) and d == -1)
    rest, total = list(found[:place] + found[place + 1 :]), list(shape)
    for side in list(rest):  # the same side on both ends needs no division
        match = next((i for i, other in enumerate(total) if other is side or _equal(other, side)), None)
        if match is not None:
            del total[match]
            rest.remove(side) if isinstance(side, int) else rest.pop(next(i for i, r in enumerate(rest) if r is side))
    found[place] = simplified(product(total) // product(rest)) if rest else product(total)
    return [simplified(d) for d in found]


def _equal(a: Dim, b: Dim) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a == b


def _reshape(scope: Scope, op: Operation) -> Value:
    x = op.value(0)
    wanted = _target(op, x.shape, op.dims(1))
    if isinstance(x, Known):
        return Known(x.array.reshape([int(d) for d in wanted]), x.dtype, x.name)
    return scope.reshape(x, wanted)


def _unsqueeze(scope: Scope, op: Operation) -> Value:
    x = op.value(0)
    given = [int(axis) for axis in (op.dims(1) if op.has(1) else op.ints("axes") or [])]
    rank = rank_of(x) + len(given)
    axes = sorted(axis % rank for axis in given)
    if isinstance(x, Known):
        return Known(np.expand_dims(x.array, tuple(axes)), x.dtype, x.name)
    shape = list(x.shape)
    for axis in axes:
        shape.insert(axis, 1)
    kept = [i for i in range(rank) if i not in axes]
    return view(x, shape, lambda i: tuple(i[k] for k in kept), ("Unsqueeze", tuple(axes)))


def _squeeze(scope: Scope, op: Operation) -> Value:
    x = op.value(0)
    rank = rank_of(x)
    axes = op.axes(rank)
    if axes is None:
        axes = [i for i, side in enumerate(x.shape) if isinstance(side, int) and side == 1]
    if isinstance(x, Known):
        return Known(x.array.reshape([s for i, s in enumerate(x.shape) if i not in axes]), x.dtype, x.name)
    kept = [i for i in range(rank) if i not in axes]

    def place(index: Any) -> Any:
        full: list[Any] = [0] * rank
        for at, axis in zip(index, kept, strict=True):
            full[axis] = at
        return tuple(full)

    return view(x, [x.shape[i] for i in kept], place, ("Squeeze", tuple(axes), rank))


def _flatten(scope: Scope, op: Operation) -> Value:
    x = scope.tensor(op.value(0))
    axis = op.whole("axis", 1) % (x.rank + 1)
    return scope.reshape(x, [product(x.shape[:axis]), product(x.shape[axis:])])


def _transpose(scope: Scope, op: Operation) -> Value:
    x = op.value(0)
    order = op.ints("perm") or list(reversed(range(rank_of(x))))
    if isinstance(x, Known):
        return Known(x.array.transpose(order), x.dtype, x.name)
    return transposed(x, order)


def transposed(x: Tensor, order: Sequence[int]) -> Tensor:
    back = [order.index(axis) for axis in range(len(order))]
    found = view(
        x, [x.shape[axis] for axis in order], lambda i: tuple(i[b] for b in back), ("Transpose", tuple(order))
    )
    if x.note is not None and list(order) == [1, 0]:
        found.note = x.note.transposed()
    return found


def _expand(scope: Scope, op: Operation) -> Value:
    x = op.value(0)
    shape = broadcast(x.shape, [simplified(d) for d in op.dims(1)])
    if isinstance(x, Known) and all(isinstance(side, int) for side in shape) and product(shape) <= 4096:
        return Known(np.broadcast_to(x.array, shape), x.dtype)
    held = scope.tensor(x)
    if held.cost and held.leaf is None:
        held = scope.force(held)
    return expression(
        shape, held.dtype, [held], lambda read, i: read(0, aligned(held.shape, i)), ("Expand", spelled(shape))
    )


def _tile(scope: Scope, op: Operation) -> Value:
    x, counts = scope.tensor(op.value(0)), op.dims(1)
    shape = [simplified(side * count) for side, count in zip(x.shape, counts, strict=True)]
    return view(
        x, shape, lambda i: tuple(tirx.floormod(at, s) for at, s in zip(i, x.shape, strict=True)),
        ("Tile", spelled(counts)),
    )  # fmt: skip


def _filled(scope: Scope, op: Operation) -> Value:
    held = np.asarray(op.attributes.get("value", np.zeros(1, np.float32))).reshape(-1)
    shape, dtype = [simplified(d) for d in op.dims(0)], held.dtype.name
    if all(isinstance(side, int) for side in shape) and product(shape) <= 4096:
        return Known(np.full(shape, held[0]), dtype)
    value = immediate(held[0], dtype)
    return expression(shape, dtype, [], lambda read, i: value, ("ConstantOfShape", str(value), spelled(shape)))


def _range(scope: Scope, op: Operation) -> Value:
    start, limit, delta = (op.known(place) for place in range(3))
    first, last, step = (known.ints()[0] for known in (start, limit, delta))
    if all(isinstance(value, int) for value in (first, last, step)) and abs(last - first) <= 4096 * abs(step):
        return Known(np.arange(first, last, step, dtype=start.dtype), start.dtype)
    if not (isinstance(step, int) and step == 1):
        raise op.unsupported("its step is not 1")
    length, dtype = simplified(last - first), start.dtype

    def make(read: Any, index: Any) -> Any:
        return tirx.Cast(dtype, index[0] + first) if dtype != "int64" else index[0] + immediate(first, "int64")

    return expression((length,), dtype, [], make, ("Range", str(first), spelled([length])))


def _identity(scope: Scope, op: Operation) -> Value:
    return op.value(0)


TABLE = {
    "ConstantOfShape": _filled,
    "Dropout": _identity,
    "Expand": _expand,
    "Flatten": _flatten,
    "Identity": _identity,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
