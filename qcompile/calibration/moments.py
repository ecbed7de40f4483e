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

    def centred(self) -> Sums:
        """Of (x, 1): those of x about its mean."""
        share = self.h[:-1, -1:] / max(self.h[-1, -1], TINY)
        change = None if self.change is None else self.change[:-1, :-1] - share * self.change[-1:, :-1]
        return Sums(self.h[:-1, :-1] - share * self.h[-1:, :-1], change)


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
    halves: list[Sums | None] = [None, None]
    tokens, fourth, number = 0, 0.0, 0
    for x, target in zip(rows(), reference() if reference is not None else (None for _ in squares), strict=True):
        pieces = 1 if len(squares) > 1 else 2  # of one sequence, its two halves
        targets = [None] * pieces if target is None else np.array_split(target, pieces)
        for piece, goal in zip(np.array_split(x, pieces), targets, strict=True):
            sizes = _squares(piece)
            weights = weigh(sizes)
            found, held = _sums(piece, weights, goal, centred), halves[number % 2]
            halves[number % 2] = found if held is None else _added(held, found)
            alone = np.square(np.square(piece, dtype=np.float64)).sum(axis=1)
            fourth += float((weights**2 * (sizes**2 - alone)).sum())
            tokens, number = tokens + len(piece), number + 1
    assert halves[0] is not None and halves[1] is not None
    return _moments((_divided(halves[0], tokens), _divided(halves[1], tokens)), tokens, fourth, centred)


def _sums(x: np.ndarray, weights: np.ndarray, target: np.ndarray | None, ones: bool) -> Sums:
    """``ones``: of (x, 1)."""
    change = None if target is None else target - x
    if ones:
        x = np.concatenate([x, np.ones_like(x[:, :1])], axis=1)
        change = None if change is None else np.concatenate([change, np.zeros_like(x[:, :1])], axis=1)
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


def _moments(halves: tuple[Sums, Sums], tokens: int, fourth: float, centred: bool) -> Moments:
    found, means = halves[0] + halves[1], None
    if centred:
        total = max(found.h[-1, -1], TINY)
        x = found.h[-1, :-1] / total
        means = Means(x, np.zeros_like(x) if found.change is None else found.change[-1, :-1] / total)
        found, halves = found.centred(), (halves[0].centred(), halves[1].centred())
    beside = float(np.square(found.h).sum() - np.square(np.diagonal(found.h)).sum())
    spread = max(fourth / tokens - beside, 0.0) / tokens
    return Moments(found, halves, spread, means)


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
