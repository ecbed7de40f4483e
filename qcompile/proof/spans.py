"""What is known of a tensor before the program runs: its type, its sizes and, exactly, between which integers it lies.

Ends are arrays of Python integers, so that no arithmetic on them overflows. They broadcast over the tensor from
the right: one element where one bound holds for the whole tensor, a row of C for one bound a channel.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

MOST = 1 << 18  # bounds kept of one tensor
WHOLE = 1 << 12  # constants up to this size are known element by element, larger ones by column
LARGEST_DIM = 2**47  # an address space holds no more elements
NOTHING: frozenset[str] = frozenset()

_TYPE = ir.DataType
_BITS = {
    _TYPE.INT2: 2, _TYPE.INT4: 4, _TYPE.INT8: 8, _TYPE.INT16: 16, _TYPE.INT32: 32, _TYPE.INT64: 64,
    _TYPE.UINT2: 2, _TYPE.UINT4: 4, _TYPE.UINT8: 8, _TYPE.UINT16: 16, _TYPE.UINT32: 32, _TYPE.UINT64: 64,
}  # fmt: skip
_ANYTHING = (-(2**63), 2**64 - 1)


@dataclasses.dataclass(frozen=True)
class Dim:
    """A size between ``lo`` and ``hi``; dims of one name are equal; ``needs``: named dims that want a bound."""

    lo: int = 0
    hi: int | None = None
    needs: frozenset[str] = NOTHING
    name: str = ""

    @property
    def size(self) -> int | None:
        return self.lo if self.lo == self.hi else None

    @property
    def top(self) -> int:
        return LARGEST_DIM if self.hi is None else self.hi


Dims = tuple[Dim, ...]


def exactly(size: int) -> Dim:
    return Dim(size, size)


@dataclasses.dataclass(frozen=True, eq=False)
class Span:
    """A tensor of ``dtype`` and ``dims`` whose elements lie in ``lo..hi``.

    ``tensor``: the constant itself, perhaps mapped; ``source``: the graph input whose values these are, moved
    but not computed with; ``needs``: the named dims without a bound that the values depend on.
    """

    dtype: ir.DataType
    dims: Dims | None
    lo: np.ndarray
    hi: np.ndarray
    tensor: np.ndarray | None = None
    source: str = ""
    needs: frozenset[str] = NOTHING

    @property
    def least(self) -> int:
        return int(self.lo.min())

    @property
    def most(self) -> int:
        return int(self.hi.max())

    @property
    def rank(self) -> int | None:
        return None if self.dims is None else len(self.dims)


def is_integer(dtype: ir.DataType | None) -> bool:
    """Whether ``dtype`` is an integer type or bool."""
    return dtype in _BITS or dtype == _TYPE.BOOL


def width(dtype: ir.DataType) -> int:
    """Bits of an integer type."""
    return _BITS[dtype]


def limits(dtype: ir.DataType | None) -> tuple[int, int]:
    """The smallest and the largest value; of a float or unknown type the widest that any integer has."""
    if dtype == _TYPE.BOOL:
        return 0, 1
    if dtype is None or dtype not in _BITS:
        return _ANYTHING
    bits = _BITS[dtype]
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.name.startswith("INT") else (0, 2**bits - 1)


def ends(values: Iterable[int] | np.ndarray) -> np.ndarray:
    """An array of Python integers with at least one axis."""
    if isinstance(values, np.ndarray):
        return np.atleast_1d(values).astype(object)
    return np.array(list(values), dtype=object)


def span(
    dtype: ir.DataType | None, dims: Dims | None, lo: np.ndarray, hi: np.ndarray, needs: frozenset[str] = NOTHING
) -> Span:
    """A span with as few bounds as say the same."""
    lo, hi = np.broadcast_arrays(lo, hi)
    if lo.size == 0:
        lo = hi = ends([0])
    if lo.size > MOST:
        lo, hi = lo.min(keepdims=True).reshape(1), hi.max(keepdims=True).reshape(1)
    if lo.size > 1 and (lo == lo.flat[0]).all() and (hi == hi.flat[0]).all():
        lo, hi = lo.reshape(-1)[:1], hi.reshape(-1)[:1]
    return Span(_TYPE.UNDEFINED if dtype is None else dtype, dims, lo, hi, needs=needs)


def between(dtype: ir.DataType | None, dims: Dims | None, lo: int, hi: int, needs: frozenset[str] = NOTHING) -> Span:
    """One bound for the whole tensor."""
    return span(dtype, dims, ends([lo]), ends([hi]), needs)


def full(dtype: ir.DataType | None, dims: Dims | None, source: str = "") -> Span:
    """Anything that ``dtype`` holds."""
    return dataclasses.replace(between(dtype, dims, *limits(dtype)), source=source)


def constant(array: np.ndarray, dtype: ir.DataType) -> Span:
    """The span of a constant, which may be mapped: its own ends, of a large one by column; no copy is made."""
    dims = tuple(exactly(size) for size in array.shape)
    if not is_integer(dtype):
        return full(dtype, dims)
    if dtype != _TYPE.BOOL and width(dtype) < 8:
        array = array.astype(np.int8)
    if array.size == 0:
        return dataclasses.replace(between(dtype, dims, 0, 0), tensor=array)
    low, high = _by_column(array)
    return dataclasses.replace(span(dtype, dims, low, high), tensor=array)


def _by_column(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    plain = array.view(np.uint8) if array.dtype == bool else array
    if array.size <= WHOLE:
        return ends(plain), ends(plain)
    if array.ndim > 1 and array.shape[-1] <= MOST:
        rows = tuple(range(array.ndim - 1))
        return ends(plain.min(axis=rows)), ends(plain.max(axis=rows))
    if array.size <= MOST:
        return ends(plain), ends(plain)
    return ends([int(plain.min())]), ends([int(plain.max())])


def known(value: Span | None) -> np.ndarray | None:
    """The tensor itself where every element is known, else None."""
    if value is None:
        return None
    if value.tensor is not None:
        return value.tensor
    shape = sizes(value.dims)
    if shape is None or math.prod(shape) > WHOLE or not (value.lo == value.hi).all():
        return None
    if any(not -(2**63) <= end < 2**63 for end in (value.least, value.most)):
        return None
    return np.broadcast_to(_fitting(value.lo, len(shape)), shape).astype(np.int64)


def _fitting(array: np.ndarray, rank: int) -> np.ndarray:
    """``array`` with no more axes than ``rank``: a scalar's bound has one."""
    return array.reshape(array.shape[array.ndim - rank :]) if array.ndim > rank else array


def ints(value: Span | None) -> list[int] | None:
    """The elements of a known vector (or scalar)."""
    array = known(value)
    return None if array is None else [int(x) for x in np.atleast_1d(array).reshape(-1)]


def sizes(dims: Dims | None) -> tuple[int, ...] | None:
    """The exact shape, or None."""
    if dims is None or any(dim.size is None for dim in dims):
        return None
    return tuple(dim.lo for dim in dims)


def padded(array: np.ndarray, rank: int) -> np.ndarray:
    """``array`` with exactly ``rank`` axes (at least one), new ones in front."""
    rank = max(rank, 1)
    return array.reshape((1,) * (rank - array.ndim) + array.shape) if array.ndim < rank else _fitting(array, rank)


def collapsed(value: Span, axes: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The ends of ``value``, one for all along ``axes`` (counted from the front; None: all axes)."""
    if axes is None or value.rank is None:
        return value.lo.min(keepdims=True).reshape(1), value.hi.max(keepdims=True).reshape(1)
    lo, hi = padded(value.lo, value.rank), padded(value.hi, value.rank)
    for axis in axes:
        lo, hi = lo.min(axis=axis, keepdims=True), hi.max(axis=axis, keepdims=True)
    return lo, hi


def join(dtype: ir.DataType | None, dims: Dims | None, values: Sequence[Span]) -> Span:
    """One span for what may be any of ``values``, element by element."""
    lo, hi = values[0].lo, values[0].hi
    for value in values[1:]:
        lo, hi = np.minimum(lo, value.lo), np.maximum(hi, value.hi)
    return span(dtype, dims, lo, hi, needs_of(values))


def needs_of(values: Iterable[Span | None]) -> frozenset[str]:
    return NOTHING.union(*(value.needs for value in values if value is not None))


# --------------------------------------------------------------------------- sizes


def broadcast(*shapes: Dims | None) -> Dims | None:
    """The sizes of an elementwise result."""
    given = [shape for shape in shapes if shape is not None]
    if len(given) < len(shapes):
        return None
    columns = itertools.zip_longest(*(reversed(shape) for shape in given), fillvalue=exactly(1))
    made = []
    for column in columns:
        dim = column[0]
        for other in column[1:]:
            dim = _wider(dim, other)
        made.append(dim)
    return tuple(reversed(made))


def _wider(a: Dim, b: Dim) -> Dim:
    if a == b or b.size == 1:
        return a
    if a.size == 1:
        return b
    if a.name and a.name == b.name:
        return meet(a, b)
    for one in (a, b):
        if one.lo >= 2 or one.size == 0:
            return one
    low = max(a.lo, b.lo) if a.lo and b.lo else 0
    high = None if a.hi is None or b.hi is None else max(a.hi, b.hi)
    return Dim(low, high, a.needs | b.needs)


def meet(a: Dim, b: Dim) -> Dim:
    """What two descriptions of one size say together."""
    hi = min((x for x in (a.hi, b.hi) if x is not None), default=None)
    return Dim(max(a.lo, b.lo), hi, NOTHING if hi is not None else a.needs | b.needs, a.name or b.name)


def product(dims: Iterable[Dim]) -> Dim:
    """The number of elements of ``dims``."""
    lo, hi, needs = 1, 1, NOTHING
    unbounded = False
    for dim in dims:
        lo, unbounded, needs = lo * dim.lo, unbounded or dim.hi is None, needs | dim.needs
        hi *= dim.top
    return Dim(lo, None if unbounded else hi, needs)


def total(dims: Iterable[Dim]) -> Dim:
    """The sum of ``dims``: the size of a concatenation."""
    dims = list(dims)
    if len(dims) == 1:
        return dims[0]
    hi = None if any(dim.hi is None for dim in dims) else sum(dim.top for dim in dims)
    return Dim(sum(dim.lo for dim in dims), hi, NOTHING.union(*(dim.needs for dim in dims)))


def sized(entry_lo: int, entry_hi: int, needs: frozenset[str]) -> Dim:
    """A size that the program computes, from the bounds of its value."""
    hi = max(entry_hi, 0)
    unbounded = hi >= LARGEST_DIM
    return Dim(max(entry_lo, 0), None if unbounded else hi, needs if unbounded else NOTHING)
