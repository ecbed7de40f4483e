"""Interval rules of operators that lay a tensor out anew, or repeat it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from qcompile.proof import spans
from qcompile.proof.moved import dims_of, moved
from qcompile.proof.spans import Dim, Dims, Span, exactly
from qcompile.proof.step import Rule, Step, UnreadableError


def _identity(step: Step) -> list[Span]:
    return [dataclasses.replace(step.x())]


def _transpose(step: Step) -> list[Span]:
    x = step.x()
    dims = dims_of(x)
    attribute = step.node.attributes.get("perm")
    order = list(attribute.as_ints()) if attribute is not None else list(range(len(dims)))[::-1]
    if sorted(order) != list(range(len(dims))):
        raise UnreadableError(f"perm {order} does not fit rank {len(dims)}")
    if not order:
        return _identity(step)
    lo, hi = (spans.padded(end, len(dims)).transpose(order) for end in (x.lo, x.hi))
    return [moved(x, tuple(dims[i] for i in order), lo, hi, lambda a: a.transpose(order))]


def _reshaped(step: Step, x: Span, target: Dims) -> Span:
    """``x`` as ``target``; bounds stay where they are those of a run of last axes that the target has too."""
    lo, hi = _laid_out(x.lo, dims_of(x), target), _laid_out(x.hi, dims_of(x), target)
    shape = spans.sizes(target)
    if lo is None or hi is None:
        lo, hi = spans.collapsed(x)
    return moved(x, target, lo, hi, None if shape is None else lambda a: a.reshape(shape))


def _laid_out(array: np.ndarray, dims: Dims, target: Dims) -> np.ndarray | None:
    if array.size == 1:
        return array.reshape(1)
    array = spans.padded(array, len(dims))
    first = next(i for i, size in enumerate(array.shape) if size > 1)
    inner, sizes = spans.sizes(dims[first:]), [dim.size for dim in target]
    if inner is None:
        return None
    count = math.prod(inner)
    for start in range(len(target) - 1, -1, -1):
        tail = sizes[start:]
        if None in tail:
            return None
        if math.prod(int(n) for n in tail if n is not None) == count:
            whole = np.broadcast_to(array.reshape(array.shape[first:]), inner)
            return whole.reshape([int(n) for n in tail if n is not None])
    return None


def _reshape(step: Step) -> list[Span]:
    x, shape = step.x(0), step.x(1)
    count = None if shape.dims is None or not shape.dims else shape.dims[0].size
    if count is None:
        raise UnreadableError("the rank of the result is unknown")
    target = _asked(x, shape, count, keep_zero=not step.number("allowzero", 0))
    inferred = step.inferred[0]
    if inferred is not None and len(inferred) == count:
        target = tuple(spans.meet(a, b) for a, b in zip(target, inferred, strict=True))
    return [_reshaped(step, x, target)]


def _asked(x: Span, shape: Span, count: int, keep_zero: bool) -> Dims:
    """The sizes that Reshape's second input asks for; 0 keeps, -1 takes the rest."""
    lows, highs = (np.broadcast_to(end, (count,)) for end in (shape.lo, shape.hi))
    given = dims_of(x)
    target: list[Dim | None] = []
    for place, (low, high) in enumerate(zip(lows, highs, strict=True)):
        if low == high == 0 and keep_zero and place < len(given):
            target.append(given[place])
        elif low == high == -1:
            target.append(None)
        elif low < 0 or (low == 0 and keep_zero):
            target.append(Dim(0, None, shape.needs) if low < 0 else _perhaps_kept(given, place, high, shape))
        else:
            target.append(spans.sized(low, high, shape.needs))
    rest = _rest(given, [dim for dim in target if dim is not None])
    return tuple(rest if dim is None else dim for dim in target)


def _perhaps_kept(given: Dims, place: int, high: int, shape: Span) -> Dim:
    """A computed size that may be 0, and then means the size that was there."""
    asked = spans.sized(0, high, shape.needs)
    if place >= len(given):
        return asked
    kept = given[place]
    top = None if asked.hi is None or kept.hi is None else max(asked.hi, kept.hi)
    return Dim(0, top, asked.needs | kept.needs)


def _rest(given: Dims, others: Sequence[Dim]) -> Dim:
    """The size that -1 stands for: the elements over the other sizes, equal ones cancelled."""
    left, divisors = list(given), []
    for dim in others:
        same = next((i for i, d in enumerate(left) if d is dim or (d.name and d.name == dim.name)), None)
        if same is not None:
            left.pop(same)
        else:
            divisors.append(dim)
    elements, by = spans.product(left), spans.product(divisors)
    if elements.size is not None and by.size:
        return exactly(elements.size // by.size)
    top = None if elements.hi is None else elements.top // max(by.lo, 1)
    return Dim(0, top, elements.needs)


def _flatten(step: Step) -> list[Span]:
    x = step.x()
    dims = dims_of(x)
    axis = step.number("axis", 1)
    axis = axis if axis == len(dims) else step.front(axis, len(dims))
    return [_reshaped(step, x, (spans.product(dims[:axis]), spans.product(dims[axis:])))]


def _axes_of(step: Step, rank: int) -> list[int] | None:
    attribute = step.node.attributes.get("axes")
    given = list(attribute.as_ints()) if attribute is not None else None
    if given is None and step.option(1) is not None:
        given = step.known(1)
    return None if given is None else [step.front(axis, rank) for axis in given]


def _squeeze(step: Step) -> list[Span]:
    x = step.x()
    dims = dims_of(x)
    axes = _axes_of(step, len(dims))
    if axes is None:
        if any(dim.size is None for dim in dims):
            raise UnreadableError("which axes have size 1 is unknown")
        axes = [i for i, dim in enumerate(dims) if dim.size == 1]
    kept = [i for i in range(len(dims)) if i not in axes]
    lo, hi = (spans.padded(end, len(dims)) for end in spans.collapsed(x, axes))
    lo, hi = (end.reshape([end.shape[i] for i in kept] or [1]) for end in (lo, hi))
    target = tuple(dims[i] for i in kept)
    shape = spans.sizes(target)
    return [moved(x, target, lo, hi, None if shape is None else lambda a: a.reshape(shape))]


def _unsqueeze(step: Step) -> list[Span]:
    x = step.x()
    dims = dims_of(x)
    given = step.known(1) if step.option(1) is not None else list(step.node.attributes["axes"].as_ints())
    rank = len(dims) + len(given)
    axes = {step.front(axis, rank) for axis in given}
    lo, hi = (spans.padded(end, len(dims)) for end in (x.lo, x.hi))
    old = iter(range(len(dims)))
    order = [None if i in axes else next(old) for i in range(rank)]
    target = tuple(exactly(1) if i is None else dims[i] for i in order)
    lo, hi = (end.reshape([1 if i is None else end.shape[i] for i in order]) for end in (lo, hi))
    shape = spans.sizes(target)
    return [moved(x, target, lo, hi, None if shape is None else lambda a: a.reshape(shape))]


def _expand(step: Step) -> list[Span]:
    x, shape = step.x(0), step.x(1)
    count = None if not shape.dims else shape.dims[0].size
    if count is None:
        raise UnreadableError("the rank of the result is unknown")
    lows, highs = (np.broadcast_to(end, (count,)) for end in (shape.lo, shape.hi))
    asked = tuple(spans.sized(low, high, shape.needs) for low, high in zip(lows, highs, strict=True))
    dims = spans.broadcast(x.dims, asked)
    assert dims is not None
    return [moved(x, dims, x.lo, x.hi)]


def _tile(step: Step) -> list[Span]:
    x, repeats = step.x(0), step.x(1)
    dims = dims_of(x)
    lows, highs = (np.broadcast_to(end, (len(dims),)) for end in (repeats.lo, repeats.hi))
    changed = [i for i in range(len(dims)) if not lows[i] == highs[i] == 1]
    lo, hi = spans.collapsed(x, changed)
    times = [spans.sized(low, high, repeats.needs) for low, high in zip(lows, highs, strict=True)]
    target = tuple(
        spans.product((dim, n)) if i in changed else dim for i, (dim, n) in enumerate(zip(dims, times, strict=True))
    )
    return [moved(x, target, lo, hi)]


RULES: dict[str, Rule] = {
    "Identity": _identity, "Transpose": _transpose, "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze, "Expand": _expand, "Tile": _tile,
}  # fmt: skip
