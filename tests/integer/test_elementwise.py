"""Elementwise operators: the integers are within steps of their grid of the floats."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.integer.grids import HEADROOM
from tests.integer.graphs import converted, drawn

X = drawn(2, 3, 8)
Z = drawn(2, 3, 8, seed=1)
UNARY = "g (float[B, S, 8] x) => (float[B, S, 8] y) { %s }"
BINARY = "g (float[B, S, 8] x, float[B, S, 8] z) => (float[B, S, 8] y) { %s }"
ROW = np.linspace(-3, 5, 8, dtype=np.float32)


@pytest.mark.parametrize("op", ("Add", "Sub"))
@pytest.mark.parametrize("constant", (ROW, np.float32(2.5), np.full((1, 1, 1), -7.25, np.float32)), ids=np.shape)
@pytest.mark.parametrize("order", ("x, c", "c, x"))
def test_a_constant_on_either_side(op: str, constant: np.ndarray, order: str) -> None:
    done = converted(UNARY % f"y = {op} ({order})", {"c": constant}, [{"x": X}])
    assert not done.skips and not done.inside()
    assert done.error({"x": X}) <= 2 * done.step() + 2**-20  # the float model rounds numbers up to 16 itself


@pytest.mark.parametrize("op", ("Add", "Sub", "Mul"))
def test_two_values(op: str) -> None:
    done = converted(BINARY % f"y = {op} (x, z)", {}, [{"x": X, "z": Z}])
    assert not done.skips and not done.inside()
    bound = 2 * done.step() if op != "Mul" else 16 * 2**-11  # one factor has 15 bits and a sign, 8 times too far
    assert done.error({"x": X, "z": Z}) <= bound


def test_large_numbers_that_nearly_cancel() -> None:
    """The result has a far finer grid than what is added."""
    x = X + np.float32(1000)
    for nodes, constants, z in (
        ("y = Sub (x, z)", {}, 1000 - Z),
        ("y = Add (x, z)", {}, -1000 + Z),
        ("n = Neg (x) y = Add (n, c)", {"c": np.float32(1000)}, Z),
    ):
        feeds = {"x": x, "z": np.asarray(z, np.float32)}
        done = converted(BINARY % nodes, constants, [feeds])
        assert not done.skips
        assert done.error(feeds) <= 3 * done.step("x") + 2e-4  # float32 itself has 6e-5 here


@pytest.mark.parametrize("op", ("Mul", "Div"))
@pytest.mark.parametrize("constant", (ROW, np.float32(-0.125), np.float32(1e-6), np.float32(3e5)), ids=str)
def test_a_constant_factor(op: str, constant: np.ndarray) -> None:
    constant = np.where(constant == 0, 1, constant).astype(np.float32)
    done = converted(UNARY % f"y = {op} (x, c)", {"c": constant}, [{"x": X}])
    assert not done.skips and not done.inside()
    reach = np.abs(done.run({"x": X})[0][0]).max()
    assert done.error({"x": X}) <= reach * 2**-14 + done.step()


def test_channels_of_small_factors_reach_as_far_as_ever() -> None:
    """One lift for all columns would saturate the last one."""
    factor = np.array([64.0, 64, 64, 64, 64, 64, 64, 2**-12], np.float32)
    x = X.copy()
    x[..., :7] *= 2**-10
    x[0, 0, 7] = 30.0
    done = converted(UNARY % "y = Mul (x, c)", {"c": factor}, [{"x": x}])
    for size in (1, 0.99 * HEADROOM):
        scaled = np.asarray(x * np.float32(size))
        assert done.error({"x": scaled}) <= 8 * done.step() + 0.25 * size * 2**-14 + 64 * size * done.step("x")


def test_squares_and_negatives() -> None:
    done = converted(UNARY % "y = Pow (x, c)", {"c": np.float32(2)}, [{"x": X}])
    assert not done.skips
    assert done.error({"x": X}) <= 16 * 2**-11
    done = converted(UNARY % "r = Relu (x) y = Mul (r, r)", {}, [{"x": X}])
    assert not done.skips
    assert done.error({"x": X}) <= 16 * 2**-11
    done = converted(UNARY % "y = Neg (x)", {}, [{"x": X}])
    assert done.error({"x": X}) <= done.step()


@pytest.mark.parametrize(("op", "error"), [("Gelu", 3e-4), ("qcompile.Silu", 3e-4), ("Relu", 0), ("Tanh", 3e-4),
                                           ("Sigmoid", 2e-4)])  # fmt: skip
@pytest.mark.parametrize("reach", (0.01, 4.0, 300.0, 1e5))
def test_activations(op: str, error: float, reach: float) -> None:
    x = drawn(2, 3, 8, reach=reach)
    done = converted(UNARY % f"y = {op} (x)", {}, [{"x": x}])
    assert not done.skips and not done.inside()
    assert done.error({"x": x}) <= error + 2 * done.step("x") + 2 * done.step()


@pytest.mark.parametrize(
    ("ends", "inputs"),
    [
        ({"lo": -1.5, "hi": 2.0}, "x, lo, hi"),
        ({"lo": -1.5}, "x, lo"),
        ({"hi": 0.5}, "x, , hi"),
        ({"lo": np.finfo(np.float32).min, "hi": np.finfo(np.float32).max}, "x, lo, hi"),
        ({"lo": -np.inf, "hi": 1.0}, "x, lo, hi"),
    ],
    ids=str,
)
def test_clip(ends: dict[str, float], inputs: str) -> None:
    held = {name: np.float32(end) for name, end in ends.items()}
    done = converted(UNARY % f"y = Clip ({inputs})", held, [{"x": X}])
    assert not done.skips
    assert done.error({"x": X}) <= done.step()


def test_where_of_numbers_and_of_constants() -> None:
    text = "g (float[B, S, 8] x, bool[B, S, 1] m, float[B, S, 8] z) => (float[B, S, 8] y) { %s }"
    feeds = {"x": X, "m": X[..., :1] > 0, "z": Z}
    for nodes, constants in (
        ("y = Where (m, x, z)", {}),
        ("y = Where (m, x, c)", {"c": np.float32(-3)}),
        ("y = Where (m, c, x)", {"c": ROW}),
    ):
        done = converted(text % nodes, constants, [feeds])
        assert not done.skips and not done.inside()
        assert done.error(feeds) <= 2 * done.step()


def test_rows_are_cut_to_a_share_of_their_ends() -> None:
    done = converted(UNARY % "y = qcompile.ClipTokens <reach = 0.75> (x)", {}, [{"x": X}])
    assert not done.skips and not done.inside()
    assert done.error({"x": X}) <= 4 * 2**-14 + done.step()


@pytest.mark.parametrize(
    ("node", "constants", "reason"),
    [
        ("y = Div (x, x)", {}, "it divides by computed numbers"),
        ("y = Pow (x, c)", {"c": np.float32(3)}, "a power other than 2"),
        ("m = ReduceMax <keepdims = 0> (x) y = Clip (x, m)", {}, "it clips at computed numbers"),
        ("y = Mul (x, c)", {"c": np.float32(np.inf)}, "a factor that is not finite"),
        ("y = Erf (x)", {}, "it has no integer form"),
    ],
)
def test_what_is_refused(node: str, constants: dict[str, np.ndarray], reason: str) -> None:
    x = np.abs(X) + 1
    text = UNARY % f"{node} "
    if reason.startswith("a factor"):
        text = UNARY % "i = Mul (x, c) n = Greater (i, x) y = Where (n, x, x)"
    done = converted(text, constants, [{"x": x}])
    assert reason in [skip.reason.split(": ")[1] for skip in done.skips]
    assert done.error({"x": x}) <= 4 * done.step("x")
