"""Second moments of a linear's inputs, and how far so few tokens can be trusted: what a solver of weights knows.

Sources: the share of shrinking, Schäfer and Strimmer 2005 (doi 10.2202/1544-6115.1175), their target D.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from qcompile.calibration.runner import matmul

Rows = Callable[[], Iterator[np.ndarray]]  # the input (tokens, K) of one sequence after the other
TINY = 1e-300


@dataclasses.dataclass(frozen=True)
class Sums:
    """Over tokens x (K) with weights t, and x_float, what the float model has in the place of x.

    h: (K, K) float64, t x x^T; change: (K, K), t x (x_float - x)^T; None where x_float is not known
    """

    h: np.ndarray
    change: np.ndarray | None = None

    def __add__(self, other: Sums) -> Sums:
        known = self.change is not None and other.change is not None
        return Sums(self.h + other.h, self.change + other.change if known else None)  # type: ignore[operator]


@dataclasses.dataclass(frozen=True)
class Means:
    """(K,), over tokens with weights t: ``x``, and ``change``, that of x_float - x; zero where that is not known."""

    x: np.ndarray
    change: np.ndarray


@dataclasses.dataclass(frozen=True)
class Moments:
    """all: sums divided by the number of tokens; halves: what every other sequence, and the others, have in them
    spread: the variance of the elements of ``h`` off its diagonal, summed
    means: where they are known, all else is about them
    """

    all: Sums
    halves: tuple[Sums, Sums] | None = None
    spread: float = 0.0
    means: Means | None = None

    @property
    def h(self) -> np.ndarray:
        return self.all.h

    def __add__(self, other: Moments) -> Moments:
        """Of the inputs of two linears with one matrix."""
        halves = None
        if self.halves is not None and other.halves is not None:
            halves = self.halves[0] + other.halves[0], self.halves[1] + other.halves[1]
        return Moments(self.all + other.all, halves, self.spread + other.spread)

    def shrunk(self) -> np.ndarray:
        """``h`` with what lies off its diagonal made smaller, by the share that comes of having few tokens."""
        diagonal = np.diag(np.diagonal(self.h))
        beside = self.h - diagonal
        share = min(1.0, self.spread / max(float(np.square(beside).sum()), TINY))
        return diagonal + (1 - share) * beside


def gather(rows: Rows, reference: Rows | None = None, centred: bool = False) -> Moments:
    """The moments of ``rows``; with ``reference``, the same tokens in the float model, what that changes as well.

    ``centred``: about the means, for linears whose biases take up what those come to.
    """
    squares = [_squares(x) for x in rows()]
    weigh = _weights(np.concatenate(squares))
    means = _means(rows, reference, weigh) if centred else None
    halves: list[Sums | None] = [None, None]
    tokens, fourth, number = 0, 0.0, 0
    for x, change in _changes(rows, reference):
        weights = weigh(_squares(x))
        if means is not None:
            x, change = x - means.x, None if change is None else change - means.change
        pieces = 1 if len(squares) > 1 else 2  # of one sequence, its two halves
        changes = [None] * pieces if change is None else np.array_split(change, pieces)
        for piece, t, changed in zip(np.array_split(x, pieces), np.array_split(weights, pieces), changes, strict=True):
            found, held = _sums(piece, t, changed), halves[number % 2]
            halves[number % 2] = found if held is None else _added(held, found)
            alone = np.square(np.square(piece, dtype=np.float64)).sum(axis=1)
            fourth += float((t**2 * (_squares(piece) ** 2 - alone)).sum())
            tokens, number = tokens + len(piece), number + 1
    assert halves[0] is not None and halves[1] is not None
    return _moments((_divided(halves[0], tokens), _divided(halves[1], tokens)), tokens, fourth, means)


def _changes(rows: Rows, reference: Rows | None) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Each sequence's x, and its x_float - x where there is a reference."""
    if reference is None:
        yield from ((x, None) for x in rows())
    else:
        yield from ((x, target - x) for x, target in zip(rows(), reference(), strict=True))


def _means(rows: Rows, reference: Rows | None, weigh: Callable[[np.ndarray], np.ndarray]) -> Means:
    total, sums = TINY, None
    for x, change in _changes(rows, reference):
        weights = weigh(_squares(x))
        found = np.stack([weights @ x, weights @ change if change is not None else np.zeros(x.shape[1])])
        total, sums = total + float(weights.sum()), found if sums is None else sums + found
    assert sums is not None
    return Means(*(sums / total).astype(np.float32))


def _sums(x: np.ndarray, weights: np.ndarray, change: np.ndarray | None) -> Sums:
    weighted = np.ascontiguousarray((x * weights[:, None]).T, np.float32)
    return Sums(_wide(matmul(weighted, x)), None if change is None else _wide(matmul(weighted, change)))


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _added(total: Sums, found: Sums) -> Sums:
    """In place: the arrays are large."""
    np.add(total.h, found.h, out=total.h)
    if total.change is not None and found.change is not None:
        np.add(total.change, found.change, out=total.change)
    return total


def _divided(sums: Sums, tokens: int) -> Sums:
    return Sums((sums.h + sums.h.T) / (2 * tokens), None if sums.change is None else sums.change / tokens)


def _moments(halves: tuple[Sums, Sums], tokens: int, fourth: float, means: Means | None) -> Moments:
    found = halves[0] + halves[1]
    beside = float(np.square(found.h).sum() - np.square(np.diagonal(found.h)).sum())
    return Moments(found, halves, max(fourth / tokens - beside, 0.0) / tokens, means)


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
