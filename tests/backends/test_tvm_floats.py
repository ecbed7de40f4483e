"""exp, erf and tanh as arithmetic, against the math library in doubles."""

from __future__ import annotations

import math

import numpy as np

from tests.backends.relax import both


def drawn() -> np.ndarray:
    near = np.linspace(-10, 10, 4001)
    return np.concatenate([near, np.linspace(-100, 80, 1001), [0.0, -0.0, 1e-30]]).astype(np.float32)[None]


def test_erf_of_numbers_large_and_small() -> None:
    x = drawn()
    y = both("g (float[b, n] x) => (float[b, n] y) { y = Erf (x) }").run(x=x)[1]["y"]
    assert np.abs(y - np.vectorize(math.erf)(x.astype(np.float64))).max() < 4e-7


def test_tanh_of_numbers_large_and_small() -> None:
    x = drawn()
    y = both("g (float[b, n] x) => (float[b, n] y) { y = Tanh (x) }").run(x=x)[1]["y"]
    exact = np.tanh(x.astype(np.float64))
    assert np.abs(y - exact).max() < 4e-7
    assert (np.abs(y - exact)[exact != 0] / np.abs(exact)[exact != 0]).max() < 4e-7


def test_rows_of_every_length_are_reduced() -> None:
    """In lanes of 16, then the tail; either may hold nothing."""
    program = both(
        "g (float[b, n] x) => (float[b, 1] a, float[b, 1] c, float[b, 1] d, float[b, n] y) {"
        " a = ReduceMax (x, axis) c = ReduceMin (x, axis) d = ReduceSum (x, axis) y = Softmax (x) }",
        {"axis": np.array([-1])},
    )
    for length in (1, 15, 16, 17, 32, 75):
        x = np.random.default_rng(length).normal(size=(3, length)).astype(np.float32) - 5 * np.float32(length % 2)
        program.close(1e-6, x=x)


def test_sigmoid_goes_through_exp() -> None:
    x = drawn()
    y = both("g (float[b, n] x) => (float[b, n] y) { y = Sigmoid (x) }").run(x=x)[1]["y"]
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    inside = x > -87
    assert (np.abs(y - exact)[inside] / exact[inside]).max() < 4e-7
    assert np.abs(y - exact)[~inside].max() < 1e-37


def test_what_is_far_below_the_largest_weighs_nothing() -> None:
    x = np.array([[0.0, -200.0, np.finfo(np.float32).min, 1.0], [-np.inf, 3.0, -np.inf, 3.0]], np.float32)
    program = both("g (float[n, 4] x) => (float[n, 4] y) { y = Softmax <axis = -1> (x) }")
    y = program.run(x=x)[1]["y"]
    assert (y[0, 1:3] == 0).all() and (y[1] == [0, 0.5, 0, 0.5]).all()
    program.close(1e-6, x=x)


def test_what_is_no_number_stays_so() -> None:
    x = np.array([[np.nan, 1.0]], np.float32)
    for operator in ("Erf", "Sigmoid", "Tanh"):
        y = both(f"g (float[b, n] x) => (float[b, n] y) {{ y = {operator} (x) }}").run(x=x)[1]["y"]
        assert np.isnan(y[0, 0]) and not np.isnan(y[0, 1])
