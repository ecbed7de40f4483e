"""Choose the codes of a weight so that the output of its linear, not the weight, stays near.

minimise over codes:  tr((W - V)^T H (W - V)),  H = mean of t x x^T over tokens, V the values of the codes; H and the
                      fit of W to the float model's outputs are shrunk by what so few tokens leave unknown
Every output column is a problem of its own, so each takes the best of several starts, rounding to nearest among them.
Sources: GPTQ (arXiv 2210.17323); its equal without inverses, LDLQ of QuIP (arXiv 2307.13304); coordinate descent
after it, QuantEase (arXiv 2309.01885); the float model's inputs as the target, GPTAQ (arXiv 2504.02692).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from qcompile.calibration.moments import Moments
from qcompile.calibration.runner import matmul
from qcompile.quant.clips import Levels, search_clips
from qcompile.quant.numerics import QuantizedWeight, dequantize, quantize
from qcompile.quant.schemes import WeightScheme

BLOCK = 128  # rows that are solved before the rest hears of them
COLUMNS = 4096  # solved at a time
LEAST_DAMPING, WORST_DAMPING = 1e-4, 1.0  # to try where H has no factor
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Settings:
    """``spread``: factors on the scales that are tried; ``sweeps``: of coordinate descent; ``order``: rows of large
    inputs first; ``damping``: of the mean of H's diagonal."""

    damping: float = 0.01
    order: bool = True
    spread: tuple[float, ...] = (1.0,)
    sweeps: int = 2


@dataclasses.dataclass(frozen=True)
class Solved:
    """The codes, and the squared error of the output as a share of the output: of rounding to nearest, and of these."""

    weight: QuantizedWeight
    error_nearest: float
    error: float


class Quadratic:
    """The objective of one input: damped H, and its factor for the feedback of rounding errors."""

    def __init__(self, moments: Moments, settings: Settings) -> None:
        known, diagonal = moments.shrunk(), np.diagonal(moments.h)
        self.energy = diagonal.astype(np.float32)
        damping = settings.damping
        while True:
            h = known + np.diag(np.where(diagonal > 0, damping * diagonal.mean(), 1.0))
            try:
                self._refine = _fit(h, moments)
                self.order = np.argsort(-diagonal, kind="stable") if settings.order else np.arange(len(h))
                self.feedback = _feedback(h[np.ix_(self.order, self.order)])
                break
            except np.linalg.LinAlgError:
                if damping >= WORST_DAMPING:
                    raise
                damping = max(10 * damping, LEAST_DAMPING)
        self.h = h.astype(np.float32)

    def target(self, w: np.ndarray) -> np.ndarray:
        """W, or where the float model's inputs are known the least squares fit to its outputs."""
        target: np.ndarray = w if self._refine is None else w + matmul(self._refine, w)
        return target

    def loss(self, error: np.ndarray) -> np.ndarray:
        """Of each column of an error (K, N): (N,)."""
        total: np.ndarray = (error * matmul(self.h, error)).sum(axis=0, dtype=np.float64)
        return total


def _fit(h: np.ndarray, moments: Moments) -> np.ndarray | None:
    """R (K, K) float32 such that x + x R is near x_float, or None where that is not known; ``h``: damped.

    A fit to few tokens explains some of any noise. So each half of the sequences is fitted and the other half says how
    much of that holds there: each column is shrunk to the share with the least error on the half it has not seen.
    """
    if moments.all.change is None or moments.halves is None:
        return None
    one, other = moments.halves
    added = (h - moments.h) / 2
    gained, spent = np.zeros(len(h)), np.full(len(h), TINY)
    for seen, unseen in ((one, other), (other, one)):
        assert seen.change is not None and unseen.change is not None
        fit = np.linalg.solve(seen.h + added, seen.change)
        gained += np.einsum("ij,ij->j", fit, unseen.change)
        spent += np.einsum("ij,ij->j", fit, unseen.h @ fit)
    share = np.clip(gained / spent, 0, 1)
    found: np.ndarray = (np.linalg.solve(h, moments.all.change) * share).astype(np.float32)
    return found


def _feedback(h: np.ndarray) -> np.ndarray:
    """A of H = (I + A) D (I + A)^T, strictly upper: what row i hears of the errors of the rows before it is
    A[:i, i]. float32."""
    root = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    feedback: np.ndarray = np.triu(root / np.diagonal(root), 1).astype(np.float32)
    return feedback


def solve(w: np.ndarray, quadratic: Quadratic, scheme: WeightScheme, settings: Settings) -> Solved:
    """The codes of W (K, N) float32; no column is worse than rounded to nearest with a searched clip."""
    parts = [_solve(w[:, i : i + COLUMNS], quadratic, scheme, settings) for i in range(0, w.shape[1], COLUMNS)]
    names = ("codes", "scale", "zero_point")
    codes, scale, zero = (np.concatenate([getattr(p[0], name) for p in parts], axis=-1) for name in names)
    nearest, found, size = (sum(part[1][i] for part in parts) for i in range(3))
    size = max(size, TINY)
    return Solved(QuantizedWeight(codes, scale, zero, parts[0][0].group_size), nearest / size, found / size)


def _solve(
    w: np.ndarray, quadratic: Quadratic, scheme: WeightScheme, settings: Settings
) -> tuple[QuantizedWeight, tuple[float, float, float]]:
    """A chunk of columns: its codes, and its loss to nearest, its loss, and the size of its output."""
    target = np.ascontiguousarray(quadratic.target(np.ascontiguousarray(w, np.float32)))
    nearest = search_clips(target, scheme, quadratic.energy)
    best = _State(nearest, nearest.nearest(target), quadratic, target)
    loss_nearest = best.loss
    for factor in settings.spread:
        levels = dataclasses.replace(nearest, scale=nearest.scale * np.float32(factor))
        best = best.better(_State(levels, _propagated(target, levels, quadratic), quadratic, target))
    for _ in range(settings.sweeps):
        best = best.better(_improved(best, quadratic, target))
    sizes = (float(loss_nearest.sum()), float(best.loss.sum()), float(quadratic.loss(target).sum()))
    return best.levels.packed(best.codes, scheme), sizes


class _State:
    """Codes at some levels, and the loss of each column."""

    def __init__(self, levels: Levels, codes: np.ndarray, quadratic: Quadratic, target: np.ndarray) -> None:
        self.levels, self.codes = levels, codes
        self.loss = quadratic.loss(levels.values(codes) - target)

    def better(self, other: _State) -> _State:
        """The better one of each column."""
        take = other.loss < self.loss
        self.codes = np.where(take, other.codes, self.codes)
        self.levels = dataclasses.replace(
            self.levels,
            scale=np.where(take, other.levels.scale, self.levels.scale),
            zero_point=np.where(take, other.levels.zero_point, self.levels.zero_point),
        )
        self.loss = np.where(take, other.loss, self.loss)
        return self


def _propagated(target: np.ndarray, levels: Levels, quadratic: Quadratic) -> np.ndarray:
    """Round row after row, each with the errors of those before it fed back."""
    order, feedback = quadratic.order, quadratic.feedback
    codes = np.empty(target.shape, np.int8)
    errors = np.empty_like(target)
    for start, stop in _blocks(len(target)):
        wanted = target[order[start:stop]]
        if start:
            wanted = wanted + matmul(feedback[:start, start:stop].T, errors[:start])
        for i in range(start, stop):
            row, affine = order[i], levels.affine(order[i])
            found = quantize(wanted[i - start] + feedback[start:i, i] @ errors[start:i], affine)
            codes[row] = found
            errors[i] = target[row] - dequantize(found, affine)
    return codes


def _improved(state: _State, quadratic: Quadratic, target: np.ndarray) -> _State:
    """Refit the scales to the codes, then every code in turn to all others."""
    levels, codes = state.levels, state.codes.copy()
    gradient = matmul(quadratic.h, levels.values(codes) - target)
    levels = _refitted(levels, codes, gradient, quadratic.h)
    _descend(levels, codes, gradient, quadratic.h)
    return _State(levels, codes, quadratic, target)


def _refitted(levels: Levels, codes: np.ndarray, gradient: np.ndarray, h: np.ndarray) -> Levels:
    """The scale of each group with the least loss for its codes; ``gradient`` (K, N) follows."""
    scale = levels.scale.copy()
    for group in range(len(scale)):
        rows = levels.rows == group
        steps = codes[rows].astype(np.float32) - levels.zero_point[group].astype(np.float32)
        curve = (steps * matmul(h[np.ix_(rows, rows)], steps)).sum(axis=0)
        change = -(steps * gradient[rows]).sum(axis=0) / np.maximum(curve, np.finfo(np.float32).tiny)
        change = np.where(scale[group] + change > 0.25 * scale[group], change, 0)
        scale[group] += change
        gradient += matmul(h[:, rows], steps * change)
    return dataclasses.replace(levels, scale=scale)


def _descend(levels: Levels, codes: np.ndarray, gradient: np.ndarray, h: np.ndarray) -> None:
    """Move every row to the codes nearest to its optimum; ``codes`` and ``gradient`` follow."""
    values = levels.values(codes)
    for start, stop in _blocks(len(codes)):
        moved = np.empty((stop - start, codes.shape[1]), np.float32)
        for row in range(start, stop):
            affine = levels.affine(row)
            slope = gradient[row] + h[row, start:row] @ moved[: row - start]
            codes[row] = quantize(values[row] - slope / h[row, row], affine)
            moved[row - start] = dequantize(codes[row], affine) - values[row]
        gradient += matmul(h[:, start:stop], moved)


def _blocks(count: int) -> Iterable[tuple[int, int]]:
    return ((start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))
