"""What is known of a linear's inputs: sums, means and how far they can be trusted, against their definitions."""

import functools

import numpy as np
import pytest

from qcompile.calibration.moments import gather

RNG = np.random.default_rng(5)
ROWS = [(RNG.normal(size=(9, 4)) + np.array([3, 0, -5, 1])).astype(np.float32) for _ in range(6)]
FLOATS = [(x + RNG.normal(size=x.shape) + 0.5).astype(np.float32) for x in ROWS]


def weights(x: np.ndarray) -> np.ndarray:
    squares = np.square(x).sum(axis=1)
    found: np.ndarray = 1 / (squares + np.median(squares)) + 1 / squares.mean()
    return found


@pytest.mark.parametrize("centred", [False, True], ids=["about zero", "about the mean"])
def test_sums_and_spread_are_as_defined(centred: bool) -> None:
    x, goal = (np.concatenate(rows).astype(np.float64) for rows in (ROWS, FLOATS))
    t, change = weights(x)[:, None], goal - x
    found = gather(functools.partial(iter, ROWS), functools.partial(iter, FLOATS), centred=centred)
    if centred:
        mean, moved = ((t * rows).sum(axis=0) / t.sum() for rows in (x, change))
        assert found.means is not None
        np.testing.assert_allclose(found.means.x, mean, rtol=1e-5)
        np.testing.assert_allclose(found.means.change, moved, rtol=1e-4)
        x, change = x - mean, change - moved
    products = t[..., None] * x[:, :, None] * x[:, None, :]  # (tokens, K, K)
    np.testing.assert_allclose(found.h, products.mean(axis=0), rtol=1e-4, atol=1e-5)
    assert found.all.change is not None
    np.testing.assert_allclose(found.all.change, (t * x).T @ change / len(x), rtol=1e-3, atol=1e-4)
    beside = ~np.eye(4, dtype=bool)
    expected = products.var(axis=0)[beside].sum() / len(x)
    np.testing.assert_allclose(found.spread, expected, rtol=1e-4)
    off = np.square(products.mean(axis=0)[beside]).sum()
    np.testing.assert_allclose(found.shrunk()[beside], (1 - min(1, expected / off)) * found.h[beside], rtol=1e-3)


def test_halves_add_up_and_one_sequence_is_split() -> None:
    for number in (6, 1):
        found = gather(functools.partial(iter, ROWS[:number]), centred=True)
        assert found.halves is not None
        np.testing.assert_allclose(found.halves[0].h + found.halves[1].h, found.h, rtol=1e-6)
        assert all(np.diagonal(half.h).all() for half in found.halves)
