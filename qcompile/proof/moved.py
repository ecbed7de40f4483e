"""What the rules of moving operators share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from qcompile.proof import spans
from qcompile.proof.spans import Dim, Dims, Span
from qcompile.proof.step import UnreadableError

Move = Callable[[np.ndarray], np.ndarray]


def dims_of(x: Span) -> Dims:
    if x.dims is None:
        raise UnreadableError("the rank is unknown")
    return x.dims


def moved(x: Span, dims: Dims, lo: np.ndarray, hi: np.ndarray, move: Move | None = None) -> Span:
    """What ``x`` is after a move to ``dims``; ``move`` makes the same of a constant as a view."""
    made = spans.span(x.dtype, dims, lo, hi, x.needs)
    tensor = move(x.tensor) if move is not None and x.tensor is not None else None
    return dataclasses.replace(made, tensor=tensor)


def with_axis(dims: Dims, axis: int, dim: Dim) -> Dims:
    """``dims`` with another size of one axis."""
    return (*dims[:axis], dim, *dims[axis + 1 :])
