"""Operators on rows: reductions, softmax and norms. The last three are one kernel each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from tvm import tirx

from qcompile.backends.tvm import floats
from qcompile.backends.tvm.operation import Operation
from qcompile.backends.tvm.operators.elementwise import elementwise
from qcompile.backends.tvm.scopes import Body, Program, Scope
from qcompile.backends.tvm.values import Known, Tensor, Value, expression, immediate, product

_KINDS = {"ReduceMax": "max", "ReduceMin": "min", "ReduceSum": "sum", "ReduceMean": "sum", "ReduceSumSquare": "sum"}


def in_one_kernel(
    scope: Scope, key: Hashable, inputs: Sequence[Tensor], build: Callable[[Scope, list[Tensor]], list[Tensor]],
    hint: str,
) -> list[Tensor]:  # fmt: skip
    """What ``build`` makes of ``inputs``; in the program as a kernel of its own."""
    if not isinstance(scope, Program):
        return build(scope, list(inputs))
    leaves = [scope.force(tensor) for tensor in inputs]

    def inside(body: Body) -> list[Tensor]:
        return build(body, leaves)

    return scope.kernel(key, leaves, inside, hint)


def _reduce(scope: Scope, op: Operation) -> Value:
    given = op.value(0)
    if isinstance(given, Known) and not given.is_symbolic and op.kind in ("ReduceMax", "ReduceMin", "ReduceSum"):
        return _known(op, given)
    x = scope.tensor(given)
    axes = op.axes(x.rank)
    if axes is None or not axes:
        if op.whole("noop_with_empty_axes"):
            return x
        axes = list(range(x.rank))
    if op.kind == "ReduceSumSquare":
        x = elementwise(scope, ("Square", x.dtype), [x], lambda v: v * v, x.dtype)
    if x.cost and x.leaf is None and x.uses > 1:
        x = scope.force(x)
    found = scope.reduce(_KINDS[op.kind], x, sorted(axes))
    if op.kind == "ReduceMean":
        found = _mean(scope, found, x, axes)
    if op.whole("keepdims", 1):
        return found
    return scope.reshape(found, [side for axis, side in enumerate(x.shape) if axis not in axes])


def _known(op: Operation, given: Known) -> Known:
    axes = op.axes(given.array.ndim)
    known: dict[str, Callable[..., Any]] = {"ReduceMax": np.max, "ReduceMin": np.min, "ReduceSum": np.sum}
    apply = known[op.kind]
    where = None if not axes else tuple(axes)
    return Known(np.asarray(apply(given.array, axis=where, keepdims=bool(op.whole("keepdims", 1)))), given.dtype)


def _mean(scope: Scope, total: Tensor, x: Tensor, axes: Sequence[int]) -> Tensor:
    count = product([x.shape[axis] for axis in axes])
    size = immediate(count, x.dtype)
    return elementwise(scope, ("Mean", str(count), x.dtype), [total], lambda v: v / size, x.dtype)


def softmax(scope: Scope, x: Tensor, axis: int) -> Tensor:
    """exp(x - max) / sum over ``axis``."""

    def build(inner: Scope, inputs: list[Tensor]) -> list[Tensor]:
        source = inputs[0]
        top = inner.reduce("max", source, [axis])
        kind = source.dtype
        grown = inner.force(elementwise(
            inner, ("Exp", kind), [source, top], lambda a, b: floats.exp(a - b, kind), kind
        ))  # fmt: skip
        total = inner.reduce("sum", grown, [axis])
        return [elementwise(inner, ("Div", kind), [grown, total], lambda a, b: a / b, kind)]

    return in_one_kernel(scope, ("softmax", axis), [x], build, "softmax")[0]


def _softmax(scope: Scope, op: Operation) -> Value:
    x = scope.tensor(op.value(0))
    return softmax(scope, x, op.whole("axis", -1) % x.rank)


def _layer_norm(scope: Scope, op: Operation) -> Value:
    x, axis, epsilon = scope.tensor(op.value(0)), op.whole("axis", -1), op.real("epsilon", 1e-5)
    axes = list(range(axis % x.rank, x.rank))
    bias = [scope.tensor(op.value(2))] if op.has(2) else []

    def build(inner: Scope, inputs: list[Tensor]) -> list[Tensor]:
        source, gain, *rest = inputs
        kind = source.dtype
        mean = inner.force(_mean(inner, inner.reduce("sum", source, axes), source, axes))
        square = elementwise(inner, ("Variance", kind), [source, mean], lambda a, m: (a - m) * (a - m), kind)
        variance = _mean(inner, inner.reduce("sum", square, axes), source, axes)
        tiny, one = immediate(epsilon, kind), immediate(1, kind)
        scale = inner.force(
            elementwise(inner, ("Root", epsilon), [variance], lambda v: one / tirx.sqrt(v + tiny), kind)
        )
        result = elementwise(
            inner, ("Normal", kind), [source, mean, scale, gain], lambda a, m, s, g: (a - m) * s * g, kind
        )
        return [elementwise(inner, ("Add", kind), [result, *rest], lambda a, b: a + b, kind) if rest else result]

    key = ("layer_norm", tuple(axes), epsilon, bool(bias))
    return in_one_kernel(scope, key, [x, scope.tensor(op.value(1)), *bias], build, "layer_norm")[0]


def _rms_norm(scope: Scope, op: Operation) -> Value:
    x, epsilon = scope.tensor(op.value(0)), op.real("epsilon", 1e-5)
    axes = list(range(op.whole("axis", -1) % x.rank, x.rank))

    def build(inner: Scope, inputs: list[Tensor]) -> list[Tensor]:
        source, gain = inputs
        kind = source.dtype
        square = elementwise(inner, ("Square", kind), [source], lambda a: a * a, kind)
        mean = _mean(inner, inner.reduce("sum", square, axes), source, axes)
        tiny = immediate(epsilon, kind)
        root = inner.force(elementwise(inner, ("Root", epsilon), [mean], lambda v: tirx.sqrt(v + tiny), kind))
        return [elementwise(inner, ("Normal", kind), [source, root, gain], lambda a, r, g: a / r * g, kind)]

    return in_one_kernel(
        scope, ("rms_norm", tuple(axes), epsilon), [x, scope.tensor(op.value(1))], build, "rms_norm"
    )[0]


def _running_sum(scope: Scope, op: Operation) -> Value:
    """CumSum, each sum anew: it is short (positions), and runs in parallel everywhere."""
    x = scope.force(op.value(0))
    axis = int(op.dims(1)[0]) % x.rank
    exclusive, reverse = bool(op.whole("exclusive")), bool(op.whole("reverse"))

    def element(read: Callable[[int, Any], Any], index: Any, k: Any) -> Any:
        at = index[axis]
        first, last = (at, k) if reverse else (k, at)
        inside = first < last if exclusive else first <= last
        return tirx.Select(inside, read(0, (*index[:axis], k, *index[axis + 1 :])), immediate(0, x.dtype))

    return scope.contract(
        x.shape, x.dtype, [x], element, x.shape[axis], ("CumSum", axis, exclusive, reverse)
    )


def repeated(x: Tensor, axis: int, times: int) -> Tensor:
    """Each slice of ``axis`` ``times`` times in a row."""
    shape = list(x.shape)
    shape[axis] = shape[axis] * times
    return expression(
        shape, x.dtype, [x], lambda read, i: read(0, (*i[:axis], tirx.floordiv(i[axis], times), *i[axis + 1 :])),
        ("Repeat", axis, times),
    )  # fmt: skip


TABLE = {
    **dict.fromkeys(_KINDS, _reduce),
    "CumSum": _running_sum,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "Softmax": _softmax,
}
