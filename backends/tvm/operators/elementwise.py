"""Operators that compute each element from the elements at its place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import tirx

from qcompile.backends.tvm import floats
from qcompile.backends.tvm.operation import DTYPES, Operation
from qcompile.backends.tvm.scopes import Scope
from qcompile.backends.tvm.values import Known, Tensor, Value, aligned, broadcast, expression, immediate, stretched

Scalar = Callable[..., Any]  # expressions of the operands -> expression


def elementwise(
    scope: Scope, key: Hashable, values: Sequence[Value], element: Scalar, dtype: str, cost: int = 1
) -> Tensor:
    """``element`` of ``values``, broadcast. A small result is never computed again for each element of a larger one."""
    shape = broadcast(*(value.shape for value in values))
    operands: list[Tensor] = []
    parts: list[Any] = []  # an expression, or the number of an operand
    for value in values:
        fixed = scope.scalar(value) if isinstance(value, Known) and value.array.size == 1 else None
        if fixed is not None:
            parts.append(fixed)
            continue
        tensor = scope.tensor(value)
        if tensor.cost and tensor.leaf is None and stretched(tensor.shape, shape):
            tensor = scope.force(tensor)
        parts.append(len(operands))
        operands.append(tensor)

    def make(read: Callable[[int, Any], Any], index: Any) -> Any:
        read_all = [
            read(part, aligned(operands[part].shape, index)) if isinstance(part, int) else part for part in parts
        ]
        return element(*read_all)

    spelled = tuple(part if isinstance(part, int) else str(part) for part in parts)
    return expression(shape, dtype, operands, make, (key, spelled, len(shape)), cost)


# --------------------------------------------------------------------------- scalars


def whole(dtype: str) -> bool:
    return dtype.startswith(("int", "uint"))


def divided(a: Any, b: Any, dtype: str) -> Any:
    """ONNX's Div: integers are cut towards zero."""
    return tirx.truncdiv(a, b) if whole(dtype) else a / b


def cast(value: Any, before: str, after: str) -> Any:
    """ONNX's Cast."""
    if before == after:
        return value
    if after == "bool":
        return value != immediate(0, before)
    if before == "bool":
        return tirx.Select(value, immediate(1, after), immediate(0, after))
    return tirx.Cast(after, value)


def _modulo(a: Any, b: Any, dtype: str, truncated: bool) -> Any:
    if not whole(dtype):
        return tirx.fmod(a, b)
    return tirx.truncmod(a, b) if truncated else tirx.floormod(a, b)


def rounded(value: Any) -> Any:
    """To the nearest whole number, halves to the even one."""
    return tirx.nearbyint(value)


def sign(value: Any, dtype: str) -> Any:
    nought, one = immediate(0, dtype), immediate(1, dtype)
    negative = nought if dtype.startswith("uint") or dtype == "bool" else immediate(-1, dtype)
    return tirx.Select(value > nought, one, tirx.Select(value < nought, negative, nought))


def _absolute(value: Any, dtype: str) -> Any:
    if not whole(dtype):
        return tirx.abs(value)
    nought = immediate(0, dtype)
    return value if dtype.startswith("uint") else tirx.Select(value < nought, nought - value, value)


def sigmoid(x: Any, dtype: str) -> Any:
    return immediate(1, dtype) / (immediate(1, dtype) + floats.exp(immediate(0, dtype) - x, dtype))


def _gelu(x: Any, dtype: str, tanh: bool) -> Any:
    half, one = immediate(0.5, dtype), immediate(1, dtype)
    if tanh:
        inner = immediate(np.sqrt(2 / np.pi), dtype) * (x + immediate(0.044715, dtype) * x * x * x)
        return half * x * (one + floats.tanh(inner, dtype))
    return half * x * (one + floats.erf(x * immediate(np.sqrt(0.5), dtype), dtype))


_ARITHMETIC: dict[str, Callable[[Any, Any, str], Any]] = {
    "Add": lambda a, b, _: a + b,
    "Sub": lambda a, b, _: a - b,
    "Mul": lambda a, b, _: a * b,
    "Div": divided,
    "Max": lambda a, b, _: tirx.max(a, b),
    "Min": lambda a, b, _: tirx.min(a, b),
    "Pow": lambda a, b, _: tirx.power(a, b),
    "PRelu": lambda a, b, dtype: tirx.Select(a < immediate(0, dtype), a * b, a),
    "BitwiseAnd": lambda a, b, _: tirx.bitwise_and(a, b),
    "BitwiseOr": lambda a, b, _: tirx.bitwise_or(a, b),
    "BitwiseXor": lambda a, b, _: tirx.bitwise_xor(a, b),
    "And": lambda a, b, _: tirx.And(a, b),
    "Or": lambda a, b, _: tirx.Or(a, b),
    "Xor": lambda a, b, _: a != b,
}
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "Equal": lambda a, b: a == b,
    "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
}
_UNARY: dict[str, Callable[[Any, str], Any]] = {
    "Abs": _absolute,
    "Ceil": lambda x, _: tirx.ceil(x),
    "Cos": lambda x, _: tirx.cos(x),
    "Erf": floats.erf,
    "Exp": lambda x, _: tirx.exp(x),
    "Floor": lambda x, _: tirx.floor(x),
    "Log": lambda x, _: tirx.log(x),
    "Neg": lambda x, dtype: immediate(0, dtype) - x if whole(dtype) else -x,
    "Not": lambda x, _: tirx.Not(x),
    "BitwiseNot": lambda x, _: tirx.bitwise_not(x),
    "Reciprocal": lambda x, dtype: immediate(1, dtype) / x,
    "Relu": lambda x, dtype: tirx.max(x, immediate(0, dtype)),
    "Round": lambda x, _: rounded(x),
    "Sigmoid": sigmoid,
    "Sign": sign,
    "Sin": lambda x, _: tirx.sin(x),
    "Softplus": lambda x, dtype: tirx.log(tirx.exp(x) + immediate(1, dtype)),
    "Sqrt": lambda x, _: tirx.sqrt(x),
    "Tanh": floats.tanh,
}


def _arithmetic(scope: Scope, op: Operation) -> Value:
    values = [op.value(place) for place in range(len(op.inputs))]
    combine, dtype = _ARITHMETIC[op.kind], values[0].dtype
    if all(isinstance(value, Known) for value in values) and op.kind in _ON_DIMS:
        return _on_dims(op.kind, [value for value in values if isinstance(value, Known)])
    found = values[0]
    for value in values[1:]:
        found = elementwise(scope, (op.kind, dtype), [found, value], lambda a, b: combine(a, b, dtype), dtype)
    return found


def _comparison(scope: Scope, op: Operation) -> Value:
    a, b, compare = op.value(0), op.value(1), _COMPARISONS[op.kind]
    if isinstance(a, Known) and isinstance(b, Known) and not (a.is_symbolic or b.is_symbolic):
        return Known(np.asarray(_COMPARED[op.kind](a.array, b.array)), "bool")
    return elementwise(scope, (op.kind, a.dtype), [a, b], compare, "bool")


def _unary(scope: Scope, op: Operation) -> Value:
    x, apply = op.value(0), _UNARY[op.kind]
    if isinstance(x, Known) and op.kind == "Neg":
        return Known(-x.array, x.dtype)
    return elementwise(scope, (op.kind, x.dtype), [x], lambda a: apply(a, x.dtype), x.dtype)


def _cast(scope: Scope, op: Operation) -> Value:
    x, dtype = op.value(0), DTYPES.get(ir.DataType(op.whole("to")))
    if dtype is None:
        raise op.unsupported(f"the type {op.whole('to')} is not known to this target")
    if x.dtype == dtype:
        return x
    if isinstance(x, Known):
        return Known(x.array if x.is_symbolic else x.array.astype(dtype), dtype, x.name)
    return elementwise(scope, ("Cast", x.dtype, dtype), [x], lambda a: cast(a, x.dtype, dtype), dtype)


def _clip(scope: Scope, op: Operation) -> Value:
    found = op.value(0)
    for place, (name, limit) in enumerate((("Max", tirx.max), ("Min", tirx.min)), 1):
        bound: Value | None = op.inputs[place] if op.has(place) else None
        attribute = op.attributes.get("min" if place == 1 else "max")
        if bound is None and attribute is not None:
            bound = Known(np.asarray(attribute, np.float32), "float32")
        if bound is not None:
            found = elementwise(scope, (name, found.dtype), [found, bound], limit, found.dtype)
    return found


def _where(scope: Scope, op: Operation) -> Value:
    condition, a, b = (op.value(place) for place in range(3))
    if isinstance(condition, Known) and isinstance(a, Known) and isinstance(b, Known) and not condition.is_symbolic:
        shape = np.broadcast_shapes(condition.shape, a.shape, b.shape)
        return Known(np.where(condition.array, np.broadcast_to(a.array, shape), b.array), a.dtype)
    return elementwise(scope, ("Where", a.dtype), [condition, a, b], tirx.Select, a.dtype)


def _gelu_node(scope: Scope, op: Operation) -> Value:
    x, tanh = scope.tensor(op.value(0)), op.text("approximate", "none") == "tanh"
    return elementwise(scope, ("Gelu", tanh, x.dtype), [x], lambda a: _gelu(a, x.dtype, tanh), x.dtype)


def _leaky(scope: Scope, op: Operation) -> Value:
    x, slope = scope.tensor(op.value(0)), op.real("alpha", 0.01)
    return elementwise(
        scope, ("LeakyRelu", slope, x.dtype), [x],
        lambda a: tirx.Select(a < immediate(0, x.dtype), a * immediate(slope, x.dtype), a), x.dtype,
    )  # fmt: skip


def _hard_sigmoid(scope: Scope, op: Operation) -> Value:
    x, a, b = scope.tensor(op.value(0)), op.real("alpha", 0.2), op.real("beta", 0.5)
    nought, one = immediate(0, x.dtype), immediate(1, x.dtype)
    return elementwise(
        scope, ("HardSigmoid", a, b, x.dtype), [x],
        lambda v: tirx.max(nought, tirx.min(one, v * immediate(a, x.dtype) + immediate(b, x.dtype))), x.dtype,
    )  # fmt: skip


def _mod(scope: Scope, op: Operation) -> Value:
    a, b, truncated = op.value(0), op.value(1), bool(op.whole("fmod"))
    return elementwise(
        scope, ("Mod", truncated, a.dtype), [a, b], lambda x, y: _modulo(x, y, a.dtype, truncated), a.dtype
    )


def _shift(scope: Scope, op: Operation) -> Value:
    a, b, left = op.value(0), op.value(1), op.text("direction") == "LEFT"
    shift = tirx.shift_left if left else tirx.shift_right
    return elementwise(scope, ("BitShift", left, a.dtype), [a, b], shift, a.dtype)


def _is_nan(scope: Scope, op: Operation) -> Value:
    x = op.value(0)
    return elementwise(scope, ("IsNaN", x.dtype), [x], tirx.isnan, "bool")


# --------------------------------------------------------------------------- numbers known now


def _trunc(a: Any, b: Any) -> Any:
    if isinstance(a, tirx.Expr) or isinstance(b, tirx.Expr):
        return a // b  # dims are never negative
    return int(a / b) if isinstance(a, float) else abs(int(a)) // abs(int(b)) * (1 if (a < 0) == (b < 0) else -1)


_ON_DIMS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _trunc,
    "Max": lambda a, b: tirx.max(a, b) if isinstance(a, tirx.Expr) or isinstance(b, tirx.Expr) else max(a, b),
    "Min": lambda a, b: tirx.min(a, b) if isinstance(a, tirx.Expr) or isinstance(b, tirx.Expr) else min(a, b),
}
_COMPARED: dict[str, Callable[..., Any]] = {
    "Equal": np.equal, "Greater": np.greater, "GreaterOrEqual": np.greater_equal, "Less": np.less,
    "LessOrEqual": np.less_equal,
}  # fmt: skip


def _on_dims(kind: str, values: Sequence[Known]) -> Known:
    found, dtype = values[0], values[0].dtype
    for value in values[1:]:
        symbolic = found.is_symbolic or value.is_symbolic
        if not symbolic and not whole(dtype):
            with np.errstate(all="ignore"):
                plain = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}
                array = (plain | {"Max": np.maximum, "Min": np.minimum})[kind](found.array, value.array)
            found = Known(np.asarray(array, dtype), dtype)
            continue
        a, b = np.broadcast_arrays(found.array.astype(object), value.array.astype(object))
        array = np.empty(a.shape, object)
        for place in np.ndindex(a.shape):
            array[place] = _ON_DIMS[kind](a[place], b[place])
        found = Known(array if symbolic else array.astype(dtype), dtype)
    return found


TABLE = {
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
    **dict.fromkeys(_COMPARISONS, _comparison),
    **dict.fromkeys(_UNARY, _unary),
    "BitShift": _shift,
    "Cast": _cast,
    "Clip": _clip,
    "Gelu": _gelu_node,
    "HardSigmoid": _hard_sigmoid,
    "IsNaN": _is_nan,
    "LeakyRelu": _leaky,
    "Mod": _mod,
    "Sum": lambda scope, op: _arithmetic(scope, Operation("Add", op.inputs, op.attributes, op.outputs, op.where)),
    "Where": _where,
}
