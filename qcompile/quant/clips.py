"""Search the clip of each column or group of a weight: both ends together, then each end on its own.

Sources: AWQ's clip search (arXiv 2306.00978); the ends apart, since a short tail on one side costs half the levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from qcompile.quant.numerics import Affine, QuantizedWeight, affine_from_range, dequantize, fake_quantize, quantize
from qcompile.quant.schemes import WeightScheme

TOGETHER = np.linspace(1.0, 0.4, 16)  # of the range of the weights
APART = (1.08, 1.04, 0.96, 0.92, 0.86, 0.8)  # of the best end so far


@dataclasses.dataclass(frozen=True)
class Levels:
    """Scales and zero points (G, N) of a weight (K, N); ``rows`` (K,): the group of each row."""

    scale: np.ndarray
    zero_point: np.ndarray
    low: int
    high: int
    rows: np.ndarray

    def affine(self, row: int) -> Affine:
        """Of one row: (N,)."""
        group = self.rows[row]
        return Affine(self.scale[group], self.zero_point[group], self.low, self.high)

    def nearest(self, w: np.ndarray) -> np.ndarray:
        """The codes of ``w``, one to one, int8."""
        spread = Affine(self.scale[self.rows], self.zero_point[self.rows], self.low, self.high)
        return quantize(w, spread).astype(np.int8)

    def values(self, codes: np.ndarray) -> np.ndarray:
        """float32 (K, N)."""
        spread = Affine(self.scale[self.rows], self.zero_point[self.rows], self.low, self.high)
        return dequantize(codes, spread)

    def packed(self, codes: np.ndarray, scheme: WeightScheme) -> QuantizedWeight:
        """As the graph stores it."""
        scale, zero = self.scale, self.zero_point.astype(np.int8)
        if scheme.group_size is None:
            return QuantizedWeight(codes, scale[0], zero[0], None)
        return QuantizedWeight(codes, scale, zero, min(scheme.group_size, len(codes)))


def groups_of(k: int, scheme: WeightScheme) -> np.ndarray:
    """The group of each of ``k`` rows: (k,)."""
    return np.arange(k) // (scheme.group_size or k)


def search_clips(w: np.ndarray, scheme: WeightScheme, energy: np.ndarray | None) -> Levels:
    """The levels of W (K, N) with the least squared error, rows weighted by ``energy`` (K,); a scheme without a clip
    keeps the whole range."""
    rows = groups_of(len(w), scheme)
    blocks, weights = _grouped(w, rows), _grouped(_column(energy, len(w)), rows)
    ends = np.stack([np.minimum(blocks.min(axis=1), 0), np.maximum(blocks.max(axis=1), 0)])  # (2, G, N)
    if scheme.clip == "mse":
        ends = _searched(blocks, weights, ends, scheme)
    affine = _affine(ends, scheme)
    return Levels(affine.scale, affine.zero_point, affine.low, affine.high, rows)


def _searched(blocks: np.ndarray, weights: np.ndarray, ends: np.ndarray, scheme: WeightScheme) -> np.ndarray:
    best, error = ends, _error(blocks, weights, ends, scheme)
    best, error = _better(blocks, weights, best, error, (ends * t for t in TOGETHER[1:]), scheme)
    if not scheme.symmetric:
        for side in (0, 1):
            trials = [np.where(np.arange(2)[:, None, None] == side, best * t, best) for t in APART]
            best, error = _better(blocks, weights, best, error, trials, scheme)
    return best


def _better(
    blocks: np.ndarray,
    weights: np.ndarray,
    best: np.ndarray,
    error: np.ndarray,
    trials: Iterable[np.ndarray],
    scheme: WeightScheme,
) -> tuple[np.ndarray, np.ndarray]:
    """For each group and column the best of ``best`` and the trials, with its error."""
    for trial in trials:
        found = _error(blocks, weights, trial, scheme)
        better = found < error
        best, error = np.where(better, trial, best), np.where(better, found, error)
    return best, error


def _error(blocks: np.ndarray, weights: np.ndarray, ends: np.ndarray, scheme: WeightScheme) -> np.ndarray:
    """Weighted squared error of each group and column: (G, N)."""
    affine = _affine(ends, scheme)
    spread = Affine(affine.scale[:, None], affine.zero_point[:, None], affine.low, affine.high)
    difference = fake_quantize(blocks, spread)
    difference -= blocks
    difference *= difference
    difference *= weights
    total: np.ndarray = difference.sum(axis=1)
    return total


def _affine(ends: np.ndarray, scheme: WeightScheme) -> Affine:
    return affine_from_range(ends[0], ends[1], scheme.bits, scheme.symmetric, signed=True)


def _column(energy: np.ndarray | None, k: int) -> np.ndarray:
    return np.ones((k, 1), np.float32) if energy is None else energy.astype(np.float32)[:, None]


def _grouped(w: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(K, N) -> (G, g, N); a last group that is shorter is filled with zeros."""
    groups = int(rows[-1]) + 1
    size = int(np.count_nonzero(rows == 0))
    padded = np.zeros((groups * size, w.shape[1]), np.float32)
    padded[: len(w)] = w
    return padded.reshape(groups, size, -1)
