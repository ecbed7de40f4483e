"""Codes for a linear's output: the recursion is GPTQ's, nothing makes a column worse, and hard inputs are survived."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qcompile.calibration.compensate import Quadratic, Settings, solve
from qcompile.calibration.moments import Moments
from qcompile.quant.clips import Levels, search_clips
from qcompile.quant.numerics import dequantize, quantize
from qcompile.quant.schemes import WeightScheme

Array = np.ndarray
PLAIN = WeightScheme(bits=3, symmetric=False)
GROUPED = WeightScheme(bits=2, symmetric=False, granularity="group", group_size=32)
ALONE = Settings(order=False, sweeps=0)


def correlated(k: int = 96, tokens: int = 400, seed: int = 0) -> Array:
    """Inputs (tokens, k) that share a few directions, as a layer's do."""
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal((tokens, 8)) @ generator.standard_normal((8, k))
    return np.asarray(shared + 0.5 * generator.standard_normal((tokens, k)), np.float32)


def moments(x: Array) -> Moments:
    return Moments((x.T @ x / len(x)).astype(np.float64))


def weight(k: int = 96, n: int = 20) -> Array:
    return np.random.default_rng(5).standard_normal((k, n)).astype(np.float32)


def by_the_paper(w: Array, h: Array, levels: Levels, order: Array) -> Array:
    """GPTQ as published: the upper Cholesky factor of the inverse Hessian, one row at a time. Codes."""
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    left = w[order].astype(np.float64)
    codes = np.empty(w.shape, np.int8)
    for i, row in enumerate(order):
        affine = levels.affine(int(row))
        codes[row] = quantize(left[i], affine)
        error = (left[i] - dequantize(codes[row].astype(np.int32), affine)) / upper[i, i]
        left[i:] -= np.outer(upper[i, i:], error)
    return codes


@pytest.mark.parametrize(("scheme", "order"), [*itertools.product((PLAIN, GROUPED), (False, True))], ids=str)
def test_rounding_with_feedback_is_gptq(scheme: WeightScheme, order: bool) -> None:
    k = 300  # over several blocks
    w, x = weight(k), correlated(k)
    settings = Settings(order=order, sweeps=0)
    quadratic = Quadratic(moments(x), settings)
    levels = search_clips(w, scheme, quadratic.energy)
    rows = np.argsort(-np.diagonal(moments(x).h), kind="stable") if order else np.arange(k)
    expected = levels.values(by_the_paper(w, quadratic.h.astype(np.float64), levels, rows))
    found = solve(w, quadratic, scheme, settings).weight.dequantized()
    differs = (expected != found).mean(axis=0)  # a tie that falls the other way changes the rows after it
    assert np.median(differs) < 0.02
    np.testing.assert_allclose(quadratic.loss(found - w).sum(), quadratic.loss(expected - w).sum(), rtol=0.02)


@pytest.mark.parametrize("scheme", (PLAIN, GROUPED, WeightScheme(bits=4)), ids=str)
def test_no_column_is_worse_than_nearest_and_each_part_helps(scheme: WeightScheme) -> None:
    w, quadratic = weight(), Quadratic(moments(correlated()), Settings())
    nearest = search_clips(w, scheme, quadratic.energy)
    losses = [quadratic.loss(nearest.values(nearest.nearest(w)) - w)]
    for settings in (Settings(sweeps=0), Settings(sweeps=2), Settings(sweeps=4, spread=(1.0, 0.9, 0.8))):
        solved = solve(w, quadratic, scheme, settings)
        losses.append(quadratic.loss(solved.weight.dequantized() - w))
        size = quadratic.loss(w).sum()
        assert solved.error == pytest.approx(losses[-1].sum() / size, rel=1e-3)
        assert solved.error_nearest == pytest.approx(losses[0].sum() / size, rel=1e-3)
    for before, after in itertools.pairwise(losses):
        assert after.sum() < 0.97 * before.sum()
    assert all((after <= losses[0] * (1 + 1e-4)).all() for after in losses)


def test_columns_that_cannot_gain_stay_as_nearest() -> None:
    """Inputs that do not correlate: rounding to nearest is the best, and what is found."""
    quadratic = Quadratic(Moments(np.eye(64)), ALONE)
    w = weight(64)
    levels = search_clips(w, PLAIN, None)
    np.testing.assert_array_equal(solve(w, quadratic, PLAIN, ALONE).weight.codes, levels.nearest(w))


def test_the_fit_to_the_float_model_makes_up_for_shrunken_inputs() -> None:
    """x is 0.8 of what it was in half of the channels: the weight grows for it."""
    x = correlated()
    factor = np.where(np.arange(96) % 2, 1.0, 0.8).astype(np.float32)
    seen = x * factor
    cross = (seen.T @ (x - seen) / len(x)).astype(np.float64)
    w, scheme = weight(), WeightScheme(bits=8)
    errors = []
    for given in (Moments(moments(seen).h), Moments(moments(seen).h, cross)):
        settings = Settings(damping=1e-4)
        found = solve(w, Quadratic(given, settings), scheme, settings).weight.dequantized()
        errors.append(np.square(seen @ found - x @ w).mean() / np.square(x @ w).mean())
    assert errors[1] < 0.01 * errors[0]


def test_dead_inputs_and_a_singular_hessian() -> None:
    x = correlated(tokens=20)  # rank 20 of 96
    x[:, [3, 50]] = 0
    for damping in (0.01, 0.0):
        quadratic = Quadratic(moments(x), Settings(damping=damping))
        solved = solve(weight(), quadratic, PLAIN, Settings())
        assert np.isfinite(solved.weight.scale).all() and solved.error < solved.error_nearest < 1
        off = np.abs(solved.weight.dequantized() - weight())[[3, 50]]
        assert off.max() < 1.6 * solved.weight.scale.max(), "a dead input's weights are near what they were"


def test_nothing_in_nothing_out() -> None:
    quadratic = Quadratic(Moments(np.zeros((8, 8))), Settings())
    solved = solve(np.zeros((8, 3), np.float32), quadratic, PLAIN, Settings())
    assert not solved.weight.dequantized().any() and solved.error == 0


def test_many_columns_are_solved_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    quadratic = Quadratic(moments(correlated()), Settings())
    whole = solve(weight(), quadratic, GROUPED, Settings())
    monkeypatch.setattr("qcompile.calibration.compensate.COLUMNS", 7)
    parts = solve(weight(), quadratic, GROUPED, Settings())
    assert parts.weight.scale.shape == whole.weight.scale.shape
    assert parts.error == pytest.approx(whole.error, rel=1e-2)
