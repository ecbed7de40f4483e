"""Interval rules of what adds up or compares along axes: reductions, running sums, integer products.

A sum is proven in every order of its terms: what is held against the type is the sum of the positive and the sum
of the negative ends, so that no partial sum of any kernel passes it either.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import onnx_ir as ir

from qcompile.proof import spans
from qcompile.proof.spans import Dim, Dims, Span, ends, exactly
from qcompile.proof.step import Rule, Step, UnreadableError

_CHUNK = 1 << 22  # weights looked at in one go
_SAFE = 2**62


@dataclasses.dataclass(frozen=True)
class Terms:
    """Ends of a sum, and what its partial sums may reach."""

    lo: np.ndarray
    hi: np.ndarray
    reach: tuple[int, int]


def _repeated(lo: np.ndarray, hi: np.ndarray, least: int, most: int) -> Terms:
    """A sum of ``least`` to ``most`` terms, each in ``lo..hi``."""
    low, high = np.minimum(lo * least, lo * most), np.maximum(hi * least, hi * most)
    return Terms(low, high, (min(int((lo * most).min()), 0), max(int((hi * most).max()), 0)))


# --------------------------------------------------------------------------- reductions


def _axes(step: Step, x: Span) -> tuple[int, ...]:
    """The reduced axes, an input since opset 13 or 18, an attribute before."""
    if x.rank is None:
        raise UnreadableError("the rank is unknown")
    attribute = step.node.attributes.get("axes")
    if attribute is not None:
        given: list[int] | None = list(attribute.as_ints())
    else:
        given = step.known(1) if step.option(1) is not None else None
    if not given:
        return () if step.number("noop_with_empty_axes", 0) else tuple(range(x.rank))
    return tuple(sorted({step.front(axis, x.rank) for axis in given}))


def _reduced(step: Step, dims: Dims, axes: tuple[int, ...]) -> Dims:
    if step.number("keepdims", 1):
        return tuple(exactly(1) if i in axes else dim for i, dim in enumerate(dims))
    return tuple(dim for i, dim in enumerate(dims) if i not in axes)


def _without(step: Step, array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Drop the reduced axes (of size 1 by now) of an array of ends unless they are kept."""
    return array if step.number("keepdims", 1) else np.atleast_1d(array.squeeze(axis=axes)) if array.ndim else array


def _extreme(step: Step) -> list[Span]:
    x = step.x()
    axes = _axes(step, x)
    assert x.dims is not None
    for axis in axes:
        _expect_some(step, x.dims[axis])
    choose = np.max if step.node.op_type == "ReduceMax" else np.min
    lo, hi = spans.padded(x.lo, len(x.dims)), spans.padded(x.hi, len(x.dims))
    for axis in axes:
        lo, hi = choose(lo, axis=axis, keepdims=True), choose(hi, axis=axis, keepdims=True)
    return [step.fitted(_reduced(step, x.dims, axes), _without(step, lo, axes), _without(step, hi, axes))]


def _expect_some(step: Step, dim: Dim) -> None:
    """The extreme of nothing is the end of the type; programs are not run on such inputs."""
    if dim.lo == 0:
        named = f"'{dim.name}'" if dim.name else f"an axis of '{step.node.inputs[0].name}'"  # type: ignore[union-attr]
        step.assumptions.append(f"{named} is at least 1 wherever its largest or smallest is taken")


def _reduce_sum(step: Step) -> list[Span]:
    x = step.x()
    axes = _axes(step, x)
    assert x.dims is not None
    rank = len(x.dims)
    lo, hi = spans.padded(x.lo, rank), spans.padded(x.hi, rank)
    below, above = np.minimum(lo, 0), np.maximum(hi, 0)  # what partial sums may reach
    for axis in axes:
        if lo.shape[axis] > 1:  # one bound an element: its size is exact
            lo, hi, below, above = (part.sum(axis=axis, keepdims=True) for part in (lo, hi, below, above))
        else:
            most = step.size(x.dims[axis], "a sum")
            terms = _repeated(lo, hi, x.dims[axis].lo, most)
            lo, hi, below, above = terms.lo, terms.hi, below * most, above * most
    lo, hi = _without(step, lo, axes), _without(step, hi, axes)
    reach = (int(below.min()), int(above.max()))
    return [step.fitted(_reduced(step, x.dims, axes), lo, hi, reach=reach)]


def _cum_sum(step: Step) -> list[Span]:
    x, axis = step.x(), step.known(1)[0]
    axis = step.front(axis, x.rank)
    assert x.dims is not None
    lo, hi = spans.collapsed(x, [axis])
    terms = _repeated(lo, hi, 0 if step.number("exclusive", 0) else 1, step.size(x.dims[axis], "a running sum"))
    return [step.fitted(x.dims, terms.lo, terms.hi, reach=terms.reach)]


def _arg(step: Step) -> list[Span]:
    x = step.x()
    axis = step.axis(0, x.rank)
    assert x.dims is not None
    _expect_some(step, x.dims[axis])
    dims = _reduced(step, x.dims, (axis,))
    needs = x.dims[axis].needs
    return [spans.between(step.dtype(), dims, 0, max(x.dims[axis].top - 1, 0), needs)]


def _top_k(step: Step) -> list[Span]:
    x, count = step.x(0), step.x(1)
    axis = step.axis(-1, x.rank)
    assert x.dims is not None
    dim = x.dims[axis]
    lo, hi = spans.collapsed(x, [axis])
    kept = spans.meet(spans.sized(count.least, count.most, count.needs), Dim(0, dim.hi, dim.needs))
    if count.most > dim.lo:
        step.complain("index", f"TopK may take {count.most} of {dim.lo} elements", dim.needs)
    dims = tuple(kept if i == axis else d for i, d in enumerate(x.dims))
    places = spans.between(step.dtype(1), dims, 0, max(dim.top - 1, 0), dim.needs)
    return [step.fitted(dims, lo, hi), places]


# --------------------------------------------------------------------------- products


def _matmul(step: Step) -> list[Span]:
    """MatMul and MatMulInteger: (.., M, K) x (.., K, N), less the zero points."""
    a, b = step.x(0), step.x(1)
    if not (spans.is_integer(a.dtype) and spans.is_integer(b.dtype)):
        return [spans.full(step.dtype(), step.inferred[0])]
    if not a.rank or not b.rank or a.dims is None or b.dims is None:
        raise UnreadableError("the rank of an operand is unknown")
    left = _less_zero(a, step.option(2), by_column=False)
    contracted = _contracted(a.dims, b.dims)
    terms = _columns(step, left, b)
    if terms is None:
        right = _less_zero(b, step.option(3), by_column=True)
        most = step.size(contracted, "a product")
        terms = _of_intervals(left, right, (len(a.dims), len(b.dims)), contracted.lo, most)
    return [step.fitted(_product_dims(a.dims, b.dims), terms.lo, terms.hi, reach=terms.reach)]


def _contracted(a: Dims, b: Dims) -> Dim:
    return spans.meet(a[-1], b[-2] if len(b) > 1 else b[0])


def _product_dims(a: Dims, b: Dims) -> Dims | None:
    batch = spans.broadcast(a[:-2], b[:-2])
    return None if batch is None else batch + (a[-2:-1] if len(a) > 1 else ()) + (b[-1:] if len(b) > 1 else ())


def _less_zero(x: Span, zero: Span | None, by_column: bool) -> Span:
    """``x`` less its zero point: one, one a column (of b), or one a row (of a: then any of them)."""
    if zero is None:
        return x
    lo, hi = (zero.lo, zero.hi) if by_column else spans.collapsed(zero)
    return spans.span(ir.DataType.UNDEFINED, x.dims, x.lo - hi, x.hi - lo)


def _of_intervals(a: Span, b: Span, ranks: tuple[int, int], least: int, most: int) -> Terms:
    """A product of which only bounds are known: K times the bounds of one term."""
    if min(ranks) < 2:
        (alo, ahi), (blo, bhi) = spans.collapsed(a), spans.collapsed(b)
    else:
        (alo, ahi), (blo, bhi) = spans.collapsed(a, [ranks[0] - 1]), spans.collapsed(b, [ranks[1] - 2])
    corners = [x * y for x, y in itertools.product((alo, ahi), (blo, bhi))]
    lo, hi = np.minimum.reduce(corners), np.maximum.reduce(corners)
    return _repeated(lo, hi, least, most)


def _columns(step: Step, a: Span, b: Span) -> Terms | None:
    """Exact ends by column where b (.., K, N) is constant: each term takes the end of a that suits its weight."""
    weights, zeros = spans.known(b), _zeros(step.option(3))
    if weights is None or zeros is None or weights.ndim < 2 or a.rank is None or a.rank < 2:
        return None
    rows = a.rank - 1  # K stays, the rest is collapsed
    lo, hi = (array.reshape(-1) for array in spans.collapsed(a, range(rows)))
    depth, columns = weights.shape[-2:]
    if not depth or not columns or lo.size not in (1, depth):
        return None
    largest = max(abs(b.least), abs(b.most)) + max(abs(int(zeros.min())), abs(int(zeros.max())))
    if max(abs(int(lo.min())), abs(int(hi.max()))) * largest * depth >= _SAFE:
        return None
    found = [_column_sums(w, zeros, lo, hi) for w in weights.reshape(-1, depth, columns)]
    low, high, below, above = (np.stack(part) for part in zip(*found, strict=True))
    reach = (int(below.min()), int(above.max()))
    return Terms(ends(low.min(axis=0)), ends(high.max(axis=0)), reach)


def _zeros(zero: Span | None) -> np.ndarray | None:
    """The zero points of the weights, one or one a column; None where they are not constant."""
    if zero is None:
        return np.zeros(1, np.int64)
    array = spans.known(zero)
    return None if array is None or array.ndim > 1 else np.atleast_1d(array).astype(np.int64)


def _column_sums(weights: np.ndarray, zeros: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, ...]:
    """Ends of ``a @ (weights - zeros)`` by column, and of its partial sums; a in ``lo..hi`` (1 or K)."""
    depth, columns = weights.shape
    low, high = lo.astype(np.int64)[:, None], hi.astype(np.int64)[:, None]
    sums = [np.zeros(columns, np.int64) for _ in range(4)]
    rows = max(_CHUNK // columns, 1)
    for start in range(0, depth, rows):
        part = slice(start, start + rows)
        w = weights[part].astype(np.int64) - zeros
        one, other = (w * (end if len(end) == 1 else end[part]) for end in (low, high))
        least, most = np.minimum(one, other), np.maximum(one, other)
        for place, terms in enumerate((least, most, np.minimum(least, 0), np.maximum(most, 0))):
            sums[place] += terms.sum(axis=0)
    return tuple(sums)


def _conv(step: Step) -> list[Span]:
    """ConvInteger: x (N, C, ..), w (M, C / group, ..); padding holds the zero point, which counts as 0."""
    x, w = step.x(0), step.x(1)
    left = _less_zero(x, step.option(2), by_column=False)
    lo, hi = np.minimum(ends([left.least]), 0), np.maximum(ends([left.most]), 0)
    if w.dims is None:
        raise UnreadableError("the rank of the weights is unknown")
    weights, zeros = spans.known(w), _zeros(step.option(3))
    if weights is not None and zeros is not None and weights.size:
        least, most, below, above = _column_sums(weights.reshape(len(weights), -1).T, zeros, lo, hi)
        shape = (-1,) + (1,) * (len(w.dims) - 2)
        reach = (int(below.min()), int(above.max()))
        return [step.fitted(step.inferred[0], ends(least).reshape(shape), ends(most).reshape(shape), reach=reach)]
    zero = step.option(3)
    right = w if zero is None else _less_zero(w, zero, by_column=False)
    depth = step.size(spans.product(w.dims[1:]), "a convolution")
    bounds = spans.between(None, None, int(lo.min()), int(hi.max()))
    terms = _of_intervals(bounds, right, (1, 1), 0, depth)
    return [step.fitted(step.inferred[0], terms.lo, terms.hi, reach=terms.reach)]


RULES: dict[str, Rule] = {
    "ReduceMax": _extreme,
    "ReduceMin": _extreme,
    "ReduceSum": _reduce_sum,
    "CumSum": _cum_sum,
    "ArgMax": _arg,
    "ArgMin": _arg,
    "TopK": _top_k,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "ConvInteger": _conv,
}
