"""Second moments of a linear's inputs: all that a solver of its weights needs to know of the samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from qcompile.calibration.runner import matmul

Rows = Callable[[], Iterator[np.ndarray]]  # the input (tokens, K) of one sequence after the other


@dataclasses.dataclass(frozen=True)
class Moments:
    """``h`` (K, K) float64: mean over tokens of t x x^T; ``cross`` (K, K): of t x (x_float - x)^T, with x_float what
    the float model has in the place of x. None where that is not known."""

    h: np.ndarray
    cross: np.ndarray | None = None

    def __add__(self, other: Moments) -> Moments:
        both = self.cross is not None and other.cross is not None
        return Moments(self.h + other.h, self.cross + other.cross if both else None)  # type: ignore[operator]


def gather(rows: Rows, reference: Rows | None = None) -> Moments:
    """The moments of ``rows``; with ``reference``, the same tokens in the float model, the cross moments as well."""
    weigh = _weights(np.concatenate([_squares(x) for x in rows()]))
    h: np.ndarray | None = None
    cross: np.ndarray | None = None
    tokens = 0
    for x, target in zip(rows(), _or_none(rows, reference), strict=True):
        weighted = np.ascontiguousarray((x * weigh(_squares(x))[:, None]).T, np.float32)
        h = _added(h, matmul(weighted, x))
        if target is not None:
            cross = _added(cross, matmul(weighted, target - x))
        tokens += len(x)
    assert h is not None
    return Moments((h + h.T) / (2 * tokens), None if cross is None else cross / tokens)


def _or_none(rows: Rows, reference: Rows | None) -> Iterable[np.ndarray | None]:
    return reference() if reference is not None else (None for _ in rows())


def _added(total: np.ndarray | None, product: np.ndarray) -> np.ndarray:
    if total is None:
        return product.astype(np.float64)
    total += product
    return total


def _squares(x: np.ndarray) -> np.ndarray:
    squares: np.ndarray = np.square(x, dtype=np.float64).sum(axis=1)
    return squares


def _weights(squares: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A token's weight by its squared norm: 1 / (it + the median one) + 1 / the mean one.

    The first part keeps a sink token, thousands of times larger than the rest, from owning the sum; the second keeps
    it from being lost in it.
    """
    middle, mean = float(np.median(squares)), max(float(squares.mean()), 1e-30)
    return lambda found: 1 / np.maximum(found + middle, 1e-30) + 1 / mean
