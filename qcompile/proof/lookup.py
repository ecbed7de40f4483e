"""Interval rules of operators that read or write at computed places: every index must be inside its axis."""

from __future__ import annotations

import numpy as np

from qcompile.proof import spans
from qcompile.proof.spans import Dim, Dims, Span
from qcompile.proof.step import Rule, Step, UnreadableError, shown


def _check_index(step: Step, index: Span, dim: Dim, what: str = "the index") -> None:
    """Complain where ``index`` may leave an axis of size ``dim``; one that the caller feeds is his to keep.

    An index below the largest size of an axis that varies is compared with its size at run time, by the runtime.
    """
    if index.least >= -dim.lo and index.most < dim.lo:
        return
    inside = f"0..{dim.lo - 1}" if dim.size is not None else f"an axis of {dim.lo} elements or more"
    if index.source:
        step.assumptions.append(f"input '{index.source}' indexes '{_name(step)}' inside {inside}")
        return
    if dim.size is None and dim.hi is not None and -dim.hi <= index.least and index.most < dim.hi:
        named = dim.name or f"an axis of '{_name(step)}'"
        step.assumptions.append(f"{what} {shown(index.least, index.most)} of '{_name(step)}' is inside '{named}'")
        return
    step.complain("index", f"{what} may be {shown(index.least, index.most)}, outside {inside}", index.needs | dim.needs)


def _name(step: Step) -> str:
    value = step.node.inputs[0]
    return (value.name if value is not None else None) or "a tensor"


def _ranks(data: Span, index: Span) -> tuple[Dims, Dims]:
    if data.dims is None or index.dims is None:
        raise UnreadableError("the rank is unknown")
    return data.dims, index.dims


def _gather(step: Step) -> list[Span]:
    data, index = step.x(0), step.x(1)
    dims, places = _ranks(data, index)
    axis = step.axis(0, len(dims))
    _check_index(step, index, dims[axis])
    target = dims[:axis] + places + dims[axis + 1 :]
    needs = data.needs
    lo, hi = (spans.padded(end, len(dims)) for end in (data.lo, data.hi))
    varies = lo.shape[axis] > 1
    chosen = spans.ints(index) if varies and spans.sizes(places) is not None else None
    if not varies:
        lo, hi = (_opened(end, axis, len(places)) for end in (lo, hi))
    elif chosen is not None and all(-dims[axis].lo <= i < dims[axis].lo for i in chosen):
        shape = [int(dim.lo) for dim in places]
        lo, hi = (end.take(np.array(chosen, np.int64).reshape(shape), axis=axis) for end in (lo, hi))
    else:
        part = (slice(None),) * axis + (_reached(index, dims[axis].lo),)
        lo, hi = lo[part].min(axis=axis, keepdims=True), hi[part].max(axis=axis, keepdims=True)
        lo, hi = (_opened(end, axis, len(places)) for end in (lo, hi))
    return [spans.span(step.dtype(), target, np.atleast_1d(lo), np.atleast_1d(hi), needs)]


def _opened(array: np.ndarray, axis: int, count: int) -> np.ndarray:
    """Replace an axis of size 1 by ``count`` of them."""
    return np.atleast_1d(array.reshape(array.shape[:axis] + (1,) * count + array.shape[axis + 1 :]))


def _reached(index: Span, size: int) -> slice:
    """The part of an axis that an index inside it can reach."""
    if index.least < 0 or index.least >= size:
        return slice(None)
    return slice(index.least, min(index.most, size - 1) + 1)


def _gather_elements(step: Step) -> list[Span]:
    data, index = step.x(0), step.x(1)
    dims, places = _ranks(data, index)
    axis = step.axis(0, len(dims))
    _check_index(step, index, dims[axis])
    lo, hi = spans.collapsed(data)
    return [spans.span(step.dtype(), places, lo, hi, data.needs)]


def _scatter_elements(step: Step) -> list[Span]:
    data, index, updates = step.x(0), step.x(1), step.x(2)
    dims, _ = _ranks(data, index)
    axis = step.axis(0, len(dims))
    _check_index(step, index, dims[axis])
    return [_overwritten(step, data, updates)]


def _scatter_nd(step: Step) -> list[Span]:
    data, index, updates = step.x(0), step.x(1), step.x(2)
    dims, places = _ranks(data, index)
    depth = places[-1].size if places else None
    if depth is None or depth > len(dims):
        raise UnreadableError("how many axes are indexed is unknown")
    for axis in range(depth):
        _check_index(step, _column(index, len(places), axis), dims[axis], f"the index into axis {axis}")
    return [_overwritten(step, data, updates)]


def _gather_nd(step: Step) -> list[Span]:
    data, index = step.x(0), step.x(1)
    dims, places = _ranks(data, index)
    first, depth = step.number("batch_dims", 0), places[-1].size if places else None
    if depth is None or first + depth > len(dims):
        raise UnreadableError("how many axes are indexed is unknown")
    for axis in range(depth):
        what = f"the index into axis {first + axis}"
        _check_index(step, _column(index, len(places), axis), dims[first + axis], what)
    lo, hi = spans.collapsed(data)
    return [spans.span(step.dtype(), places[:-1] + dims[first + depth :], lo, hi, data.needs)]


def _column(index: Span, rank: int, place: int) -> Span:
    """The ``place``-th of the last axis of a tuple index."""
    lo, hi = (spans.padded(end, rank) for end in (index.lo, index.hi))
    if lo.shape[-1] > 1:
        lo, hi = lo[..., place : place + 1], hi[..., place : place + 1]
    return Span(index.dtype, index.dims, lo, hi, source=index.source, needs=index.needs)


def _overwritten(step: Step, data: Span, updates: Span) -> Span:
    if step.text("reduction", "none") != "none":
        raise UnreadableError("a scatter that reduces")
    (low, high), (least, most) = spans.collapsed(data), spans.collapsed(updates)
    lo, hi = np.minimum(low, least), np.maximum(high, most)
    return spans.span(step.dtype(), data.dims, lo, hi, data.needs | updates.needs)


def _non_zero(step: Step) -> list[Span]:
    x = step.x()
    if x.dims is None:
        raise UnreadableError("the rank is unknown")
    count = spans.product(x.dims)
    dims = (spans.exactly(len(x.dims)), Dim(0, count.hi, count.needs))
    top = max((dim.top for dim in x.dims), default=1)
    return [spans.between(step.dtype(), dims, 0, max(top - 1, 0), count.needs)]


RULES: dict[str, Rule] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "NonZero": _non_zero,
}
