"""QuantizeLinear and its kin: to codes, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from qcompile.backends.tvm.notes import Activation, Rows, Weight
from qcompile.backends.tvm.operation import Operation
from qcompile.backends.tvm.operators.elementwise import elementwise, rounded
from qcompile.backends.tvm.operators.rows import in_one_kernel
from qcompile.backends.tvm.scopes import Scope
from qcompile.backends.tvm.values import Known, Tensor, Value, immediate, view

LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}
TINY = 1.1754944e-38  # the smallest step, as in the project's functions


def _along(value: Value, like: Tensor, axis: int, block: int, scope: Scope) -> Value:
    """A scale or zero point in a form that broadcasts against ``like``."""
    if len(value.shape) == 0 or (isinstance(value, Known) and value.array.size == 1):
        return value
    held = scope.tensor(value)
    if block:
        return view(
            held, like.shape, lambda i: tuple(tirx.floordiv(at, block) if a == axis else at for a, at in enumerate(i)),
            ("Blocks", axis, block),
        )  # fmt: skip
    shape = [like.shape[axis] if a == axis else 1 for a in range(like.rank)]
    return view(held, shape, lambda i: (i[axis],), ("Along", axis, like.rank))


def _quantize(scope: Scope, op: Operation) -> Value:
    x, scale = scope.tensor(op.value(0)), op.value(1)
    zero = op.value(2) if op.has(2) else None
    dtype = zero.dtype if zero is not None else "uint8"
    if dtype not in LIMITS:
        raise op.unsupported(f"codes of type {dtype}")
    axis, block = op.whole("axis", 1) % max(1, x.rank), op.whole("block_size")
    low, high = (immediate(limit, x.dtype) for limit in LIMITS[dtype])
    ends = [_along(value, x, axis, block, scope) for value in (scale, zero) if value is not None]

    def element(a: Any, s: Any, z: Any = None) -> Any:
        code = rounded(a / s)
        code = code if z is None else code + tirx.Cast(x.dtype, z)
        return tirx.Cast(dtype, tirx.max(tirx.min(code, high), low))

    return elementwise(scope, ("QuantizeLinear", dtype), [x, *ends], element, dtype)


def _dequantize(scope: Scope, op: Operation) -> Value:
    codes, scale = op.value(0), op.value(1)
    zero = op.value(2) if op.has(2) else None
    held = scope.tensor(codes)
    axis, block = op.whole("axis", 1) % max(1, held.rank), op.whole("block_size")
    ends = [_along(value, held, axis, block, scope) for value in (scale, zero) if value is not None]
    dtype = scale.dtype

    def element(c: Any, s: Any, z: Any = None) -> Any:
        value = tirx.Cast(dtype, c)
        return (value if z is None else value - tirx.Cast(dtype, z)) * s

    made = elementwise(scope, ("DequantizeLinear", dtype), [held, *ends], element, dtype)
    if isinstance(codes, Known) and isinstance(scale, Known) and not isinstance(zero, Tensor):
        made.note = Weight(
            codes.array, scale.array, None if zero is None else zero.array, axis, block, name=codes.name or "weight"
        )
    elif isinstance(scale, Known) and scale.array.size == 1 and not isinstance(zero, Tensor):
        made.note = Activation(held, scale, zero)
    return made


def _dynamic(scope: Scope, op: Operation) -> Sequence[Value]:
    """DynamicQuantizeLinear: uint8 codes on the grid of the whole tensor's range."""

    def build(inner: Scope, inputs: list[Tensor]) -> list[Tensor]:
        source = inputs[0]
        axes, nought = list(range(source.rank)), immediate(0, "float32")
        high, low = inner.reduce("max", source, axes), inner.reduce("min", source, axes)
        scale = inner.force(elementwise(
            inner, "DynamicScale", [high, low],
            lambda a, b: (tirx.max(a, nought) - tirx.min(b, nought)) / immediate(255, "float32"), "float32",
        ))  # fmt: skip

        def middle(b: Any, s: Any) -> Any:
            raw = rounded(nought - tirx.min(b, nought) / s)
            return tirx.Cast("uint8", tirx.max(tirx.min(raw, immediate(255, "float32")), nought))

        zero = inner.force(elementwise(inner, "DynamicZero", [low, scale], middle, "uint8"))

        def element(a: Any, s: Any, z: Any) -> Any:
            code = rounded(a / s) + tirx.Cast("float32", z)
            return tirx.Cast("uint8", tirx.max(tirx.min(code, immediate(255, "float32")), nought))

        return [elementwise(inner, "DynamicCodes", [source, scale, zero], element, "uint8"), scale, zero]

    codes, scale, zero = in_one_kernel(scope, "dynamic", [scope.tensor(op.value(0))], build, "dynamic_quantize")
    return [codes, scope.reshape(scale, []), scope.reshape(zero, [])]


# --------------------------------------------------------------------------- the project's own


def _per_token(scope: Scope, op: Operation) -> Value:
    """FakeQuantizePerToken: codes, and what makes floats of them again."""
    levels = op.real("levels")
    symmetric = op.kind.endswith("Symmetric")

    def build(inner: Scope, inputs: list[Tensor]) -> list[Tensor]:
        return _symmetric_rows(inner, inputs[0], levels) if symmetric else _rows(inner, inputs[0], levels)

    made = in_one_kernel(scope, (op.kind, levels), [scope.tensor(op.value(0))], build, "quantize_rows")
    codes, step, zero = made if len(made) == 3 else (*made, None)
    values = [codes, step] if zero is None else [codes, step, zero]

    def element(c: Any, s: Any, z: Any = None) -> Any:
        code = tirx.Cast("int32", c)
        return tirx.Cast("float32", code if z is None else code - z) * s

    found = elementwise(scope, ("rows", zero is None), values, element, "float32")
    found.note = Rows(codes, step, zero)
    return found


def _rows(inner: Scope, x: Tensor, levels: float) -> list[Tensor]:
    """uint8 codes, step, and int32 zero point of each row."""
    last, nought, tiny = [x.rank - 1], immediate(0, "float32"), immediate(TINY, "float32")
    top, bottom = inner.reduce("max", x, last), inner.reduce("min", x, last)
    steps = immediate(levels, "float32")

    def width(a: Any, b: Any) -> Any:
        return tirx.max((tirx.max(a, nought) - tirx.min(b, nought)) / steps, tiny)

    step = inner.force(elementwise(inner, ("Step", levels), [top, bottom], width, "float32"))
    zero = inner.force(elementwise(
        inner, "Zero", [bottom, step], lambda b, s: tirx.Cast("int32", nought - rounded(tirx.min(b, nought) / s)),
        "int32",
    ))  # fmt: skip

    def code(a: Any, s: Any, z: Any) -> Any:
        first = nought - tirx.Cast("float32", z)
        held = tirx.min(tirx.max(rounded(a / s), first), steps + first)
        return tirx.Cast("uint8", held - first)

    return [elementwise(inner, ("Codes", levels), [x, step, zero], code, "uint8"), step, zero]


def _symmetric_rows(inner: Scope, x: Tensor, levels: float) -> list[Tensor]:
    """int8 codes and step of each row."""
    tiny, steps = immediate(TINY, "float32"), immediate(levels, "float32")
    size = elementwise(inner, "Abs", [x], tirx.abs, "float32")
    top = inner.reduce("max", size, [x.rank - 1])
    step = inner.force(
        elementwise(inner, ("Step", levels), [top], lambda a: tirx.max(a / steps, tiny), "float32")
    )
    codes = elementwise(
        inner, "Codes", [x, step], lambda a, s: tirx.Cast("int8", rounded(a / s)), "int8"
    )
    return [codes, step]


TABLE: dict[str, Callable[[Scope, Operation], Any]] = {
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic,
    "QuantizeLinear": _quantize,
}
OWN: dict[str, Callable[[Scope, Operation], Any]] = {
    "FakeQuantizePerToken": _per_token,
    "FakeQuantizePerTokenSymmetric": _per_token,
}
