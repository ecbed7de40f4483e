"""Codes for a linear's output: the recursion is GPTQ's, nothing makes a column worse, and hard inputs are survived."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from qcompile.calibration.compensate import Quadratic, Settings, solve
from qcompile.calibration.moments import Moments, Sums, gather
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
    return Moments(Sums((x.T @ x / len(x)).astype(np.float64)))


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
    quadratic = Quadratic(Moments(Sums(np.eye(64))), ALONE)
    w = weight(64)
    levels = search_clips(w, PLAIN, None)
    np.testing.assert_array_equal(solve(w, quadratic, PLAIN, ALONE).weight.codes, levels.nearest(w))


def fitted(seen: Array, x: Array, w: Array, *, know: bool, sequences: int = 10) -> Array:
    """The weight for inputs ``seen`` with 8 bits; ``know``: that they were ``x`` in the float model."""

    def pieces(rows: Array) -> Iterator[Array]:
        return iter(np.array_split(rows, sequences))

    found = gather(lambda: pieces(seen), (lambda: pieces(x)) if know else None)
    settings = Settings(damping=1e-4)
    return solve(w, Quadratic(found, settings), WeightScheme(bits=8), settings).weight.dequantized()


@pytest.mark.parametrize("sequences", [1, 10])
def test_the_fit_to_the_float_model_makes_up_for_shrunken_inputs(sequences: int) -> None:
    """x is 0.8 of what it was in half of the channels: the weight grows for it."""
    x, w = correlated(tokens=2000), weight()
    seen = x * np.where(np.arange(96) % 2, 1.0, 0.8).astype(np.float32)
    errors = [
        np.square(seen @ fitted(seen, x, w, know=know, sequences=sequences) - x @ w).mean() for know in (False, True)
    ]
    assert errors[1] < 0.01 * errors[0]


def test_a_fit_to_few_tokens_does_not_learn_their_noise() -> None:
    """What the float model had is 0.8 of the input and noise: on new tokens no fit must do worse than none."""
    w, everything = weight(), correlated(tokens=6000)
    noise = 0.5 * np.random.default_rng(3).standard_normal(everything.shape).astype(np.float32)
    new = everything[2000:]
    for tokens, share in ((100, 1.0), (200, 1.0), (2000, 0.1)):
        x = everything[:tokens]
        weights = [fitted(x, 0.8 * x + noise[:tokens], w, know=know) for know in (False, True)]
        errors = [np.square(new @ found - 0.8 * new @ w).mean() for found in weights]
        assert errors[1] < share * errors[0]


def one(x: Array) -> Iterator[Array]:
    return iter([x])


def test_few_tokens_correlate_by_chance() -> None:
    """The more tokens there are, the more of what they have in common is believed."""
    shares = []
    for tokens in (60, 600, 6000):
        x = np.random.default_rng(tokens).standard_normal((tokens, 96)).astype(np.float32)
        found = gather(functools.partial(one, x))
        inside, outside = (np.abs(h - np.diag(np.diagonal(h))).mean() for h in (found.shrunk(), found.h))
        shares.append(inside / outside)
    assert max(shares) < 0.1, "independent channels"
    x = correlated(tokens=6000)
    found = gather(functools.partial(one, x))
    assert np.abs(found.shrunk() - found.h).max() < 0.02 * np.abs(found.h).max()


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
    quadratic = Quadratic(Moments(Sums(np.zeros((8, 8)))), Settings())
    solved = solve(np.zeros((8, 3), np.float32), quadratic, PLAIN, Settings())
    assert not solved.weight.dequantized().any() and solved.error == 0


def test_many_columns_are_solved_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    quadratic = Quadratic(moments(correlated()), Settings())
    whole = solve(weight(), quadratic, GROUPED, Settings())
    monkeypatch.setattr("qcompile.calibration.compensate.COLUMNS", 7)
    parts = solve(weight(), quadratic, GROUPED, Settings())
    assert parts.weight.scale.shape == whole.weight.scale.shape
    assert parts.error == pytest.approx(whole.error, rel=1e-2)
