"""Interval rules of elementwise operators. Div truncates, Mod has the divisor's sign (fmod = 1: the dividend's)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.proof import spans
from qcompile.proof.spans import Span, ends
from qcompile.proof.step import Rule, Step, UnreadableError

EXACT_POWER = 2**53  # ONNX Runtime raises integers to a power in doubles


def _quotient(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


_divide = np.frompyfunc(_quotient, 2, 1)
_bits = np.frompyfunc(lambda a, b: (1 << max(a if a >= 0 else ~a, b if b >= 0 else ~b).bit_length()) - 1, 2, 1)


def _dims(step: Step) -> spans.Dims | None:
    return spans.broadcast(*(value.dims for value in step.ins if value is not None))


def _extremes(corners: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return functools.reduce(np.minimum, corners), functools.reduce(np.maximum, corners)


def _corners(a: Span, b: Span, operation: Callable[..., np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The ends of an operation that is monotone in each operand."""
    return _extremes([operation(x, y) for x, y in itertools.product((a.lo, a.hi), (b.lo, b.hi))])


def _add(step: Step) -> list[Span]:
    a, b = step.x(0), step.x(1)
    return [step.fitted(_dims(step), a.lo + b.lo, a.hi + b.hi)]


def _sub(step: Step) -> list[Span]:
    a, b = step.x(0), step.x(1)
    lo, hi = a.lo - b.hi, a.hi - b.lo
    related = _difference(step)
    if related is not None:
        lo, hi = np.maximum(lo, related[0]), np.minimum(hi, related[1])
    return [step.fitted(_dims(step), lo, hi)]


def _difference(step: Step) -> tuple[np.ndarray, np.ndarray] | None:
    """What ``x - y`` is known to be where ``y`` was made of ``x``: a remainder, a quotient times c, an extreme."""
    left, right = step.node.inputs[:2]
    a, b = step.x(0), step.x(1)
    maker = _maker(right)
    if maker is not None and maker.op_type == "Mod" and maker.inputs[0] is left and not _flag(maker, "fmod", 0):
        divisor = maker.inputs[1]
        return _whole_part(a, b, None if divisor is None else step.others.get(divisor))
    if maker is not None and _is_quotient_times(maker, left):  # a remainder: the sign of x, and no larger
        return np.minimum(a.lo, 0), np.maximum(a.hi, 0)
    if _is_extreme_of(maker, left):
        return _below_extreme(a, b, maker.op_type == "ReduceMax")  # type: ignore[union-attr]
    maker = _maker(left)
    if _is_extreme_of(maker, right):
        lo, hi = _below_extreme(b, a, maker.op_type == "ReduceMax")  # type: ignore[union-attr]
        return -hi, -lo
    return None


def _is_extreme_of(maker: ir.Node | None, x: ir.Value | None) -> bool:
    """Whether ``maker`` is the largest or smallest of ``x`` along axes that it keeps."""
    named = maker is not None and maker.op_type in ("ReduceMax", "ReduceMin")
    return named and maker.inputs[0] is x and _flag(maker, "keepdims", 1)  # type: ignore[union-attr,arg-type]


def _whole_part(a: Span, rest: Span, divisor: Span | None) -> tuple[np.ndarray, np.ndarray]:
    """``x - Mod(x, c)``: the multiple of c that is next to x; as Mod has the sign of c, on its far side from c."""
    if divisor is not None and ((divisor.lo == divisor.hi) & (divisor.lo > 0)).all():
        return a.lo - a.lo % divisor.lo, a.hi - a.hi % divisor.lo
    lo = np.where(rest.hi <= 0, a.lo, np.where(a.lo >= 0, 0, a.lo - rest.hi))
    hi = np.where(rest.lo >= 0, a.hi, np.where(a.hi <= 0, 0, a.hi - rest.lo))
    return lo, hi


def _below_extreme(x: Span, extreme: Span, is_max: bool) -> tuple[np.ndarray, np.ndarray]:
    """``x - max(x) <= 0``, ``x - min(x) >= 0``."""
    lo, hi = x.lo - extreme.hi, x.hi - extreme.lo
    return (np.minimum(lo, 0), np.minimum(hi, 0)) if is_max else (np.maximum(lo, 0), np.maximum(hi, 0))


def _maker(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.domain in ("", "ai.onnx") else None


def _flag(node: ir.Node, name: str, default: int) -> bool:
    attribute = node.attributes.get(name)
    return bool(default if attribute is None else attribute.as_int())


def _is_quotient_times(node: ir.Node, x: ir.Value | None) -> bool:
    """Whether ``node`` is ``(x / c) * c``."""
    if node.op_type != "Mul" or x is None:
        return False
    for quotient, factor in (node.inputs[:2], node.inputs[1::-1]):
        divide = _maker(quotient)
        if divide is not None and divide.op_type == "Div" and divide.inputs[0] is x and divide.inputs[1] is factor:
            return True
    return False


def _mul(step: Step) -> list[Span]:
    a, b = step.x(0), step.x(1)
    lo, hi = _corners(a, b, np.multiply)
    if step.node.inputs[0] is step.node.inputs[1]:
        lo = np.where((a.lo <= 0) & (a.hi >= 0), ends([0]), np.minimum(a.lo * a.lo, a.hi * a.hi))
    for value in step.node.inputs:
        divide = _maker(value)
        dividend = divide.inputs[0] if divide is not None and divide.op_type == "Div" else None
        if dividend is not None and _is_quotient_times(step.node, dividend):
            lo, hi = _towards_zero(step, dividend, lo, hi)
    return [step.fitted(_dims(step), lo, hi)]


def _towards_zero(step: Step, dividend: ir.Value, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(x / c) * c`` is no further from zero than x."""
    x = step.others.get(dividend)
    return (lo, hi) if x is None else (np.maximum(lo, np.minimum(x.lo, 0)), np.minimum(hi, np.maximum(x.hi, 0)))


def _parts(step: Step, divisor: Span) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The negative and the positive part of a divisor, each with where it is not empty; zero is complained of."""
    if ((divisor.lo <= 0) & (divisor.hi >= 0)).any():
        step.complain("divisor", f"the divisor may be 0: it is {divisor.least}..{divisor.most}", divisor.needs)
    below = (divisor.lo, np.minimum(divisor.hi, -1), divisor.lo <= -1)
    above = (np.maximum(divisor.lo, 1), divisor.hi, divisor.hi >= 1)
    return [part for part in (below, above) if part[2].any()]


def _div(step: Step) -> list[Span]:
    a, b = step.x(0), step.x(1)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for low, high, there in _parts(step, b):
        low, high = np.where(there, low, 1), np.where(there, high, 1)
        found.append((*_extremes([_divide(x, y) for x in (a.lo, a.hi) for y in (low, high)]), there))
    return [step.fitted(_dims(step), *_either(step, found))]


def _either(step: Step, found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The union of intervals, each where its flag is set."""
    if not found:
        return tuple(ends([end]) for end in spans.limits(step.dtype()))  # type: ignore[return-value]
    lo, hi, there = found[0]
    for low, high, here in found[1:]:
        lo = np.where(there & here, np.minimum(lo, low), np.where(here, low, lo))
        hi = np.where(there & here, np.maximum(hi, high), np.where(here, high, hi))
    return lo, hi


def _mod(step: Step) -> list[Span]:
    a, b = step.x(0), step.x(1)
    found = []
    for low, high, there in _parts(step, b):
        if step.number("fmod", 0):
            size = np.maximum(np.abs(low), np.abs(high)) - 1
            lo, hi = np.maximum(np.minimum(a.lo, 0), -size), np.minimum(np.maximum(a.hi, 0), size)
        elif (low >= 1).all():
            lo, hi = _positive_rest(a, low, high)
        else:
            lo, hi = low + 1, np.zeros_like(low)
        found.append((lo, hi, there))
    return [step.fitted(_dims(step), *_either(step, found))]


def _positive_rest(a: Span, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``x mod c`` for c in ``low..high``, all positive: x itself where it is smaller, or stays in one period."""
    fixed = low == high
    same = fixed & (a.lo // low == a.hi // low)
    inside = (a.lo >= 0) & (a.hi < low)
    lo = np.where(inside, a.lo, np.where(same, a.lo % low, 0))
    hi = np.where(a.lo >= 0, np.minimum(a.hi, high - 1), high - 1)
    return lo, np.where(inside, a.hi, np.where(same, a.hi % low, hi))


def _neg(step: Step) -> list[Span]:
    return [step.fitted(step.x().dims, -step.x().hi, -step.x().lo)]


def _abs(step: Step) -> list[Span]:
    x = step.x()
    lo = np.maximum(np.maximum(x.lo, -x.hi), 0)
    return [step.fitted(x.dims, lo, np.maximum(-x.lo, x.hi))]


def _sign(step: Step) -> list[Span]:
    x = step.x()
    return [step.fitted(x.dims, np.maximum(np.minimum(x.lo, 1), -1), np.maximum(np.minimum(x.hi, 1), -1))]


def _relu(step: Step) -> list[Span]:
    return [step.fitted(step.x().dims, np.maximum(step.x().lo, 0), np.maximum(step.x().hi, 0))]


def _pick(step: Step, choose: np.ufunc) -> list[Span]:
    given = [value for value in step.ins if value is not None]
    lo, hi = (functools.reduce(choose, side) for side in ([v.lo for v in given], [v.hi for v in given]))
    return [step.fitted(_dims(step), lo, hi)]


def _clip(step: Step) -> list[Span]:
    """min(max(x, low), high): the upper end wins."""
    x, low, high = step.x(), step.option(1), step.option(2)
    lo, hi = x.lo, x.hi
    if low is not None:
        lo, hi = np.maximum(lo, low.lo), np.maximum(hi, low.hi)
    if high is not None:
        lo, hi = np.minimum(lo, high.lo), np.minimum(hi, high.hi)
    return [step.fitted(x.dims, lo, hi)]


def _where(step: Step) -> list[Span]:
    condition, a, b = step.x(0), step.x(1), step.x(2)
    always, never = condition.lo == 1, condition.hi == 0
    lo = np.where(always, a.lo, np.where(never, b.lo, np.minimum(a.lo, b.lo)))
    hi = np.where(always, a.hi, np.where(never, b.hi, np.maximum(a.hi, b.hi)))
    return [step.fitted(_dims(step), lo, hi)]


def _cast(step: Step) -> list[Span]:
    x = step.x()
    if not spans.is_integer(x.dtype):
        return [spans.full(step.dtype(), x.dims)]
    if step.dtype() == ir.DataType.BOOL:
        some = ((x.lo > 0) | (x.hi < 0)).astype(int)
        any_ = ((x.lo != 0) | (x.hi != 0)).astype(int)
        return [step.fitted(x.dims, ends(some), ends(any_))]
    return [step.fitted(x.dims, x.lo, x.hi, kind="narrowing")]


def _pow(step: Step) -> list[Span]:
    x, exponent = step.x(0), step.known(1)
    if len(set(exponent)) != 1 or exponent[0] < 0:
        raise UnreadableError("the exponent is not one constant of at least 0")
    n = exponent[0]
    if n > 64:
        raise UnreadableError(f"the exponent is {n}")
    lo, hi = _extremes([x.lo**n, x.hi**n])
    if n % 2 == 0 and n:
        lo = np.where((x.lo <= 0) & (x.hi >= 0), ends([0]), lo)
    if max(abs(int(lo.min())), abs(int(hi.max()))) > EXACT_POWER:
        step.complain("overflow", "the power may pass 2^53, up to which runtimes compute it exactly", x.needs)
    return [step.fitted(_dims(step), lo, hi)]


def _shift(step: Step) -> list[Span]:
    x, amount = step.x(0), step.x(1)
    bits = spans.width(x.dtype)
    if x.least < 0:
        raise UnreadableError("a shift of signed values")
    if amount.most >= bits or amount.least < 0:
        reach = f"{amount.least}..{amount.most}"
        step.complain("shift", f"the shift may be {reach}, of {bits} bits", amount.needs)
        return [spans.full(step.dtype(), _dims(step))]
    if step.text("direction", "") == "RIGHT":
        return [step.fitted(_dims(step), x.lo >> amount.hi, x.hi >> amount.lo)]
    return [step.fitted(_dims(step), x.lo << amount.lo, x.hi << amount.hi)]


def _and(step: Step) -> list[Span]:
    a, b = step.x(0), step.x(1)
    mask = _bits(np.minimum(a.lo, b.lo), np.maximum(a.hi, b.hi))
    lo, hi = -mask - 1, mask
    positive = (a.lo >= 0) | (b.lo >= 0)
    lo = np.where(positive, 0, lo)
    top = np.where((a.lo >= 0) & (b.lo >= 0), np.minimum(a.hi, b.hi), np.where(a.lo >= 0, a.hi, b.hi))
    return [step.fitted(_dims(step), lo, np.where(positive, top, hi))]


def _or(step: Step) -> list[Span]:
    a, b = step.x(0), step.x(1)
    mask = _bits(np.minimum(a.lo, b.lo), np.maximum(a.hi, b.hi))
    positive = (a.lo >= 0) & (b.lo >= 0)
    bottom = np.maximum(a.lo, b.lo) if step.node.op_type == "BitwiseOr" else ends([0])
    return [step.fitted(_dims(step), np.where(positive, bottom, -mask - 1), mask)]


def _not(step: Step) -> list[Span]:
    x, top = step.x(), spans.limits(step.x().dtype)
    around = top[1] + top[0]  # ~x = -1 - x, of unsigned types the largest less x
    return [step.fitted(x.dims, around - x.hi, around - x.lo)]


def _compare(
    step: Step, surely: Callable[[Span, Span], np.ndarray], never: Callable[[Span, Span], np.ndarray]
) -> list[Span]:
    a, b = step.x(0), step.x(1)
    if not (spans.is_integer(a.dtype) and spans.is_integer(b.dtype)):
        return [spans.full(step.dtype(), _dims(step))]
    lo, hi = surely(a, b).astype(int), 1 - never(a, b).astype(int)
    return [step.fitted(_dims(step), ends(lo), ends(hi))]


def _less(a: Span, b: Span) -> np.ndarray:
    found: np.ndarray = a.hi < b.lo
    return found


def _at_most(a: Span, b: Span) -> np.ndarray:
    found: np.ndarray = a.hi <= b.lo
    return found


def _equal(a: Span, b: Span) -> np.ndarray:
    found: np.ndarray = (a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo)
    return found


def _apart(a: Span, b: Span) -> np.ndarray:
    found: np.ndarray = _less(a, b) | _less(b, a)
    return found


def _xor(step: Step) -> list[Span]:
    return [spans.full(step.dtype(), _dims(step))]


RULES: dict[str, Rule] = {
    "Add": _add, "Sub": _sub, "Mul": _mul, "Div": _div, "Mod": _mod, "Neg": _neg, "Abs": _abs, "Sign": _sign,
    "Relu": _relu, "Clip": _clip, "Where": _where, "Cast": _cast, "Pow": _pow,
    "Max": lambda step: _pick(step, np.maximum), "Min": lambda step: _pick(step, np.minimum),
    "And": lambda step: _pick(step, np.minimum), "Or": lambda step: _pick(step, np.maximum), "Xor": _xor,
    "Not": _not, "BitwiseNot": _not, "BitShift": _shift, "BitwiseAnd": _and, "BitwiseOr": _or, "BitwiseXor": _or,
    "Less": lambda step: _compare(step, _less, lambda a, b: _at_most(b, a)),
    "LessOrEqual": lambda step: _compare(step, _at_most, lambda a, b: _less(b, a)),
    "Greater": lambda step: _compare(step, lambda a, b: _less(b, a), _at_most),
    "GreaterOrEqual": lambda step: _compare(step, lambda a, b: _at_most(b, a), _less),
    "Equal": lambda step: _compare(step, _equal, _apart),
}  # fmt: skip
