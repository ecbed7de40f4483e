"""Second moments of a linear's inputs, and how far so few tokens can be trusted: what a solver of weights knows.

Sources: the share of shrinking, Schäfer and Strimmer 2005 (doi 10.2202/1544-6115.1175), their target D.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from qcompile.calibration.runner import matmul

Rows = Callable[[], Iterator[np.ndarray]]  # the input (tokens, K) of one sequence after the other


@dataclasses.dataclass(frozen=True)
class Cross:
    """Of tokens x (K) with weights t, and x_float, what the float model has in the place of x.

    change: (K, K), mean of t x (x_float - x)^T; half, half_change: what every other sequence has in ``h`` and in that
    """

    change: np.ndarray
    half: np.ndarray
    half_change: np.ndarray

    def __add__(self, other: Cross) -> Cross:
        return Cross(self.change + other.change, self.half + other.half, self.half_change + other.half_change)


@dataclasses.dataclass(frozen=True)
class Moments:
    """h: (K, K) float64, mean over tokens of t x x^T; spread: the variance of its elements off the diagonal, summed;
    cross: None where the float model's inputs are not known."""

    h: np.ndarray
    spread: float = 0.0
    cross: Cross | None = None

    def __add__(self, other: Moments) -> Moments:
        known = self.cross is not None and other.cross is not None
        cross = self.cross + other.cross if known else None  # type: ignore[operator]
        return Moments(self.h + other.h, self.spread + other.spread, cross)

    def shrunk(self) -> np.ndarray:
        """``h`` with what lies off its diagonal made smaller, by the share that comes of having few tokens."""
        diagonal = np.diag(np.diagonal(self.h))
        beside = self.h - diagonal
        share = min(1.0, self.spread / max(float(np.square(beside).sum()), 1e-300))
        return diagonal + (1 - share) * beside


class _Sums:
    """What is added up over tokens."""

    def __init__(self) -> None:
        self.tokens, self.fourth = 0, 0.0
        self.h: np.ndarray | None = None
        self.change: np.ndarray | None = None

    def add(self, x: np.ndarray, weights: np.ndarray, target: np.ndarray | None) -> None:
        weighted = np.ascontiguousarray((x * weights[:, None]).T, np.float32)
        self.h = _added(self.h, matmul(weighted, x))
        if target is not None:
            self.change = _added(self.change, matmul(weighted, target - x))
        alone = np.square(np.square(x, dtype=np.float64)).sum(axis=1)
        self.fourth += float((weights**2 * (_squares(x) ** 2 - alone)).sum())
        self.tokens += len(x)


def gather(rows: Rows, reference: Rows | None = None) -> Moments:
    """The moments of ``rows``; with ``reference``, the same tokens in the float model, the cross moments as well."""
    squares = [_squares(x) for x in rows()]
    weigh = _weights(np.concatenate(squares))
    halves = _Sums(), _Sums()
    number = 0
    for x, target in zip(rows(), reference() if reference is not None else (None for _ in squares), strict=True):
        pieces = 1 if len(squares) > 1 else 2  # of one sequence, its two halves
        targets = [None] * pieces if target is None else np.array_split(target, pieces)
        for piece, goal in zip(np.array_split(x, pieces), targets, strict=True):
            if len(piece):
                halves[number % 2].add(piece, weigh(_squares(piece)), goal)
            number += 1
    return _mean(halves)


def _mean(halves: tuple[_Sums, _Sums]) -> Moments:
    tokens = sum(half.tokens for half in halves)
    hs = [half.h / tokens for half in halves if half.h is not None]
    changes = [half.change / tokens for half in halves if half.change is not None]
    total = sum(hs[1:], start=hs[0])
    h = (total + total.T) / 2
    beside = float(np.square(h).sum() - np.square(np.diagonal(h)).sum())
    spread = max(sum(half.fourth for half in halves) / tokens - beside, 0.0) / tokens
    cross = Cross(sum(changes[1:], start=changes[0]), (hs[0] + hs[0].T) / 2, changes[0]) if changes else None
    return Moments(h, spread, cross)


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
