"""Interval rules of operators that join, cut and pad along an axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompile.proof import spans
from qcompile.proof.moved import Move, dims_of, moved, with_axis
from qcompile.proof.spans import Dim, Span, ends, exactly
from qcompile.proof.step import Rule, Step, UnreadableError


def _concat(step: Step) -> list[Span]:
    given = [value for value in step.ins if value is not None]
    rank = given[0].rank
    axis = step.axis(0, rank)
    shapes = [dims_of(value) for value in given]
    joined = spans.total(shape[axis] for shape in shapes)
    others = [with_axis(shape, axis, exactly(1)) for shape in shapes]
    rest = tuple(_one_of(dims) for dims in zip(*others, strict=True))
    dims = with_axis(rest, axis, joined)
    lo, hi = _side_by_side(given, axis, [shape[axis].size for shape in shapes])
    return [spans.span(step.dtype(), dims, lo, hi, spans.needs_of(given))]


def _one_of(dims: Sequence[Dim]) -> Dim:
    """Equal sizes, described several times."""
    found = dims[0]
    for dim in dims[1:]:
        found = spans.meet(found, dim)
    return found


def _side_by_side(given: Sequence[Span], axis: int, counts: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray]:
    """The ends of a concatenation: one an element of ``axis`` where that is small and known."""
    joined = sum(n for n in counts if n is not None)
    rest = max(value.lo.size for value in given)
    if None in counts or joined * rest > spans.MOST:
        parts = [spans.collapsed(value, [axis]) for value in given]
        lo, hi = parts[0]
        for low, high in parts[1:]:
            lo, hi = np.minimum(lo, low), np.maximum(hi, high)
        return lo, hi
    rank = len(dims_of(given[0]))
    made = []
    for ends_of in ([value.lo for value in given], [value.hi for value in given]):
        arrays = [spans.padded(array, rank) for array in ends_of]
        around = np.broadcast_shapes(*((*a.shape[:axis], 1, *a.shape[axis + 1 :]) for a in arrays))
        shapes = [(*around[:axis], int(n or 0), *around[axis + 1 :]) for n in counts]
        made.append(np.concatenate([np.broadcast_to(a, s) for a, s in zip(arrays, shapes, strict=True)], axis=axis))
    return made[0], made[1]


def _split(step: Step) -> list[Span]:
    x = step.x()
    dims = dims_of(x)
    axis = step.axis(0, len(dims))
    counts = _split_sizes(step, dims[axis])
    made, start = [], 0
    for place in range(len(step.node.outputs)):
        if counts is None:
            part = Dim(0, dims[axis].hi, dims[axis].needs)
            lo, hi = spans.collapsed(x, [axis])
            made.append(moved(x, with_axis(dims, axis, part), lo, hi))
            continue
        made.append(_cut(step, x, axis, slice(start, start + counts[place]), exactly(counts[place])))
        start += counts[place]
    return made


def _split_sizes(step: Step, dim: Dim) -> list[int] | None:
    if step.option(1) is not None:
        return spans.ints(step.option(1))
    if dim.size is None:
        return None
    parts = len(step.node.outputs)
    each = -(-dim.size // parts)
    return [min(each, max(dim.size - i * each, 0)) for i in range(parts)]


def _cut(step: Step, x: Span, axis: int, part: slice, size: Dim) -> Span:
    """``x`` with ``part`` of ``axis``."""
    dims = dims_of(x)
    lo, hi = (spans.padded(end, len(dims)) for end in (x.lo, x.hi))
    place = (slice(None),) * axis + (part,)
    if lo.shape[axis] > 1:
        lo, hi = lo[place], hi[place]
    move: Move | None = (lambda a: a[place]) if dims[axis].size is not None else None
    return moved(x, with_axis(dims, axis, size), lo, hi, move)


def _slice(step: Step) -> list[Span]:
    x, starts, stops = step.x(0), spans.ints(step.x(1)), spans.ints(step.x(2))
    dims = dims_of(x)
    axes = _slice_axes(step, len(dims))
    steps = step.known(4) if step.option(4) is not None else [1] * len(axes)
    if any(n == 0 for n in steps):
        raise UnreadableError("a step of 0")
    for place, axis in enumerate(axes):
        if starts is None or stops is None:
            dim = dims[axis]
            lo, hi = spans.collapsed(x, [axis])
            part = Dim(0, dim.hi, dim.needs)
            x = moved(x, with_axis(dims_of(x), axis, part), lo, hi)
        else:
            x = _one_slice(step, x, axis, starts[place], stops[place], steps[place])
    return [x]


def _slice_axes(step: Step, rank: int) -> list[int]:
    if step.option(3) is not None:
        return [step.front(axis, rank) for axis in step.known(3)]
    count = step.x(1).dims
    size = None if not count else count[0].size
    if size is None:
        raise UnreadableError("the sliced axes are unknown")
    return list(range(size))


def _one_slice(step: Step, x: Span, axis: int, start: int, stop: int, stride: int) -> Span:
    dim = dims_of(x)[axis]
    if dim.size is not None:
        part = _python_slice(start, stop, stride, dim.size)
        return _cut(step, x, axis, part, exactly(len(range(dim.size)[part])))
    size = dim if (start, stride) == (0, 1) and stop >= spans.LARGEST_DIM else _sliced(dim, start, stop, stride)
    lo, hi = spans.collapsed(x, [axis])
    return moved(x, with_axis(dims_of(x), axis, size), lo, hi)


def _sliced(dim: Dim, start: int, stop: int, stride: int) -> Dim:
    """What is left of an axis of unknown size."""
    if stride < 0:
        return Dim(0, dim.hi, dim.needs)
    high = dim.hi if stop < 0 else min(stop, dim.top)
    if start < 0:
        high = min(-start, dim.top)
    elif high is not None:
        high = max(high - start, 0)
    return Dim(0, dim.hi, dim.needs) if high is None else Dim(0, -(-high // stride))


def _python_slice(start: int, stop: int, stride: int, size: int) -> slice:
    """ONNX counts negative places from the end and clamps the rest; below the start, Python wants None."""
    if stride < 0:
        stop += size if stop < 0 else 0
        return slice(max(min(start + size if start < 0 else start, size - 1), 0), None if stop < 0 else stop, stride)
    return slice(start, stop, stride)


def _pad(step: Step) -> list[Span]:
    x, pads = step.x(0), step.known(1)
    dims = dims_of(x)
    axes = [step.front(a, len(dims)) for a in step.known(3)] if step.option(3) is not None else list(range(len(dims)))
    before, after = dict(zip(axes, pads[: len(axes)], strict=True)), dict(zip(axes, pads[len(axes) :], strict=True))
    target = []
    for axis, dim in enumerate(dims):
        more = before.get(axis, 0) + after.get(axis, 0)
        target.append(
            Dim(max(dim.lo + more, 0), None if dim.hi is None else max(dim.hi + more, 0), dim.needs) if more else dim
        )
    changed = [a for a in axes if before[a] or after[a]]
    lo, hi = spans.collapsed(x, changed)
    if step.text("mode", "constant") == "constant":
        filler = step.option(2)
        low, high = (ends([0]), ends([0])) if filler is None else (filler.lo, filler.hi)
        lo, hi = np.minimum(lo, low), np.maximum(hi, high)
    return [moved(x, tuple(target), lo, hi)]


def _trilu(step: Step) -> list[Span]:
    x = step.x()
    return [moved(x, dims_of(x), np.minimum(x.lo, 0), np.maximum(x.hi, 0))]


RULES: dict[str, Rule] = {
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Trilu": _trilu,
}
