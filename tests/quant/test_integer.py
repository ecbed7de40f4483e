"""The integer operators against float64: each keeps the error that its docstring states."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.errors import UserError
from qcompile.quant import integer

Array = np.ndarray
FEW = settings(max_examples=80, deadline=None, derandomize=True)
ROW = hnp.array_shapes(min_dims=2, max_dims=2, max_side=24)


def rows(bound: int) -> st.SearchStrategy[Array]:
    """Wide values up to ``bound``, rows of very different size among them."""
    sizes = st.integers(0, bound.bit_length() - 1).map(lambda bits: min(bound, 2**bits))
    return sizes.flatmap(lambda size: hnp.arrays(np.int32, ROW, elements=st.integers(-size, size)))


def drawn(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


# --------------------------------------------------------------------------- to another grid


@FEW
@given(
    x=st.integers(-(2**30) + 1, 2**30 - 1),
    m=st.integers(-(2**15) + 1, 2**15 - 1),
    log=st.integers(0, 29),
    ends=st.sampled_from([(-(2**30), 2**30), (-128, 127)]),
)
def test_requantize_is_one_rounding_of_the_exact_quotient(x: int, m: int, log: int, ends: tuple[int, int]) -> None:
    exact = (x * m + (2 ** (15 + log) if log else 0)) >> (16 + log)  # Python's integers have no end
    assert integer.requantize(x, m, 2**log, *ends) == min(max(exact, ends[0]), ends[1])


@FEW
@given(factor=st.floats(2.0**-30, 2.0**20), bits=st.sampled_from((8, 12, 15)))
def test_a_fitted_factor_is_close(factor: float, bits: int) -> None:
    for sign in (1, -1):
        m, d, lift = integer.fit(sign * factor, bits)
        assert abs(m) < 2**15 and 1 <= d <= 2**29 and lift >= 0 and (lift == 0) == (factor < 0.5)
        assert abs(2.0**lift * m / (2.0**16 * float(d)) / (sign * factor) - 1) <= 2.0**-bits


def test_factors_of_columns_have_divisors_of_their_own_or_one_for_all() -> None:
    factors = np.array([0.49999, 1e-3, 0.0, -0.25, 2.0**-28])
    m, d, lift = integer.fit(factors)
    assert lift == 0 and d.shape == factors.shape and m[2] == 0
    np.testing.assert_allclose(m / (2.0**16 * d), factors, rtol=2.0**-15, atol=0)
    m, d, _ = integer.fit(factors, common=True)
    assert d.shape == () and np.abs(m / (2.0**16 * d) - factors).max() <= 0.5 * 2.0**-15
    with pytest.raises(UserError, match="not finite"):
        integer.fit([1.0, np.inf])


@pytest.mark.parametrize(("narrow", "divisor"), [(1, 2), (2**7, 2**3), (2**14, 2**6)])
@FEW
@given(a=st.integers(-(2**30) + 1, 2**30 - 1), b=st.integers(-(2**29), 2**29))
def test_a_product_is_close_where_its_second_factor_fits(a: int, b: int, narrow: int, divisor: int) -> None:
    b = min(max(b, -32767 * narrow), 32767 * narrow)
    y = int(integer.multiply_wide(a, b, narrow, divisor, -(2**30), 2**30))
    exact = a * b / (narrow * 2**16 * divisor)
    assert abs(y - exact) <= 0.5 + abs(a) / (2**17 * divisor) + 1e-6
    if a > 0:
        square = int(integer.relu_squared(b, narrow, divisor, 2**30))
        assert abs(square - max(b, 0) ** 2 / (narrow * 2**16 * divisor)) <= 0.5 + max(b, 0) / (2**17 * divisor) + 1e-6


@pytest.mark.parametrize("symmetric", (True, False))
@FEW
@given(x=rows(2**29 - 1), bits=st.sampled_from((4, 6, 8)))
def test_codes_of_tokens_move_values_by_half_a_step(x: Array, bits: int, symmetric: bool) -> None:
    codes, zero, step, divisor = integer.quantize_per_token(x, bits, symmetric)
    scale = step * 2.0 ** (33 - bits) / (2.0**16 * divisor)
    assert (divisor >= 2).all() and (step >= 2**13 - 1).all() and (step < 2**15).all()
    low = 1 if symmetric else 0
    assert low <= codes.min() and codes.max() < 2**bits and (symmetric <= (zero == 2 ** (bits - 1))).all()
    assert (np.where(x == 0, codes - zero, 0) == 0).all(), "zero is exact"
    extent = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    slack = extent * (2.0**-13 + 2.0**-20)  # of the step, at the farthest code, and of the shift
    ends = 0 if symmetric else 0.5 * scale  # the zero point is rounded: an end may lose half a step
    assert (np.abs((codes - zero.astype(np.float64)) * scale - x) <= 0.5 * scale + ends + slack + 1e-9).all()


def test_step_and_divisor_bring_products_back() -> None:
    x = np.rint(drawn(0, 40, 64) * 2.0 ** np.linspace(12, 24, 40)[:, None]).astype(np.int32)
    weights = np.random.default_rng(1).integers(-127, 128, (64, 8))
    codes, zero, step, divisor = integer.quantize_per_token(x, 8, symmetric=False)
    products = (codes.astype(np.int64) - zero) @ weights
    lifted = products * 2**9
    y = integer.requantize(lifted, step, divisor, -(2**30), 2**30) * 2.0**25 / 2**9
    exact = (x.astype(np.int64) @ weights).astype(np.float64)
    scale = (np.abs(x).max(axis=1, keepdims=True) / 127) * np.sqrt((weights**2).sum(axis=0))
    assert (np.abs(y - exact) <= 2 * scale + 2.0**16).all()


# --------------------------------------------------------------------------- norms


@FEW
@given(v=st.integers(0, 2**52))
def test_the_root_is_exact(v: int) -> None:
    assert int(integer.isqrt(np.array(v))) == math.isqrt(v)


def exact_norm(x: Array, centred: bool, epsilon: int) -> Array:
    real = x.astype(np.float64)
    if centred:
        real = real - real.mean(axis=-1, keepdims=True)
    result: Array = real / np.sqrt((real**2).mean(axis=-1, keepdims=True) + epsilon)
    return result


@pytest.mark.parametrize("centred", (False, True))
@pytest.mark.parametrize("channels", (8, 768, 4096, 16384))
def test_norms_are_within_2_to_the_13(channels: int, centred: bool) -> None:
    sizes = 2.0 ** np.linspace(7, 24, 12)[:, None]
    x = drawn(channels, 12, channels) * sizes
    x[::3, 0] *= 0.15 * math.sqrt(channels)  # an outlier, up to twenty times the rest
    x[1::3] += 0.5 * sizes[1::3]
    x = np.clip(np.rint(x), -(2**28), 2**28).astype(np.int32)
    for epsilon in (0, 2**10):
        y = (integer.layer_norm if centred else integer.rms_norm)(x, epsilon) / 2.0**20
        exact = exact_norm(x, centred, epsilon)
        deviation = np.std(x, axis=-1, keepdims=True)
        mean_error = 0.5 / deviation if centred else 0  # the mean is rounded to a unit
        assert (np.abs(y - exact) <= 2.0**-13 * np.abs(exact) + 2.0**-14 + mean_error).all()


def test_rows_below_the_grid_are_short_and_zero_stays_zero() -> None:
    assert (integer.rms_norm(np.zeros((2, 8), np.int32)) == 0).all()
    assert (integer.layer_norm(np.full((2, 8), 12345, np.int32)) == 0).all()
    small = integer.rms_norm(np.array([[1, -1, 16, -16]], np.int32)) / 2.0**20
    np.testing.assert_allclose(small, [[1 / 32, -1 / 32, 0.5, -0.5]], rtol=2.0**-13)
    peak = np.zeros((1, 16384), np.int32)
    peak[0, 3] = 2**29
    assert integer.rms_norm(peak)[0, 3] == 2**26  # 128, held to 64


# --------------------------------------------------------------------------- attention


def exact_softmax(real: Array, mask: Array) -> Array:
    shifted = np.where(mask, real, -np.inf)
    p = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    result: Array = p / p.sum(axis=-1, keepdims=True)
    return result


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.0007 + 0.5 / 255), (16, 0.0007)])
@pytest.mark.parametrize(("period", "lift"), [(2**13, 1), (2**14 + 77, 8), (2**16 - 1, 2**10)])
def test_the_exponential(bits: int, bound: float, period: int, lift: int) -> None:
    d = np.unique(np.rint(np.linspace(0, 20, 100_000) * period / math.log(2) / lift)).astype(np.int32)
    weights, _ = integer.softmax_weights(-d[None], np.array([True]), period, lift, bits)
    exact = np.exp(-d[None] * (math.log(2) * lift / period))
    assert np.abs(weights / (2.0**bits - 1) - exact).max() <= bound
    assert weights[0, 0] == 2**bits - 1 and (np.diff(weights[0]) <= 0).all() and weights[0, -1] == 0


@pytest.mark.parametrize("sigma", (0.5, 1, 3, 10))
@pytest.mark.parametrize("columns", (128, 1024))
def test_softmax_under_deferred_normalisation(columns: int, sigma: float) -> None:
    """16 bits hold 0.001. With 8, what lies below 1/510 of the largest is lost, however exact the exponential."""
    real = sigma * drawn(columns, 64, columns)
    period = 2**15
    scores = np.rint(real * period / math.log(2)).astype(np.int32)
    mask = np.arange(columns) <= np.arange(columns - 64, columns)[:, None]
    exact = exact_softmax(real, mask)
    errors = {}
    for bits in (8, 16):
        weights, total = integer.softmax_weights(scores, mask, period, 1, bits)
        np.testing.assert_array_equal(weights.sum(axis=-1, keepdims=True), total)  # rows sum to one, exactly
        assert (weights[~mask] == 0).all()
        errors[bits] = np.abs(weights / total - exact).max()
    ideal = np.rint(255 * exact / exact.max(axis=-1, keepdims=True))
    lost = np.abs(ideal / ideal.sum(axis=-1, keepdims=True) - exact).max()
    assert errors[16] <= 0.001 and errors[8] <= lost + 2e-4
    assert sigma > 1 or errors[8] <= 0.001


def test_a_row_that_attends_to_nothing() -> None:
    scores, mask = np.full((2, 5), -(2**29), np.int32), np.zeros((2, 5), bool)
    mask[1, 2] = True
    weights, total = integer.softmax_weights(scores, mask, 2**13, 1, 8)
    assert weights.tolist() == [[0] * 5, [0, 0, 255, 0, 0]] and total.tolist() == [[1], [255]]
    assert (integer.normalize_attention(np.zeros((1, 3), np.int32), total[:1]) == 0).all()
    assert (integer.normalize_attention16(np.zeros((1, 3)), np.zeros((1, 3)), total[:1]) == 0).all()


@FEW
@given(total=st.integers(1, 255 * 32768), share=st.floats(-128, 128))
def test_sums_are_divided_exactly(total: int, share: float) -> None:
    sums = min(max(round(total * share), -128 * total), 128 * total)
    assert integer.normalize_attention(sums, total) == math.floor((sums * 128 + total // 2) / total)


@pytest.mark.parametrize("lift", (1, 64))
def test_sums_of_16_bit_weights(lift: int) -> None:
    generator = np.random.default_rng(0)
    total = generator.integers(65535, 65535 * 16384 // lift, (50, 1))
    weighed = np.rint(total * generator.uniform(-120, 120, (50, 64))).astype(np.int64)
    low = generator.integers(-(2**20) // lift, 2**20 // lift, (50, 64))
    high = (weighed - low) // 256
    low = weighed - 256 * high
    y = integer.normalize_attention16(high, low, total, lift) / (32 * lift)
    assert (np.abs(y - weighed / total) <= 2.0**-14 * 128 + 1 / (32 * lift)).all()


def test_rotary_embedding_rotates_and_rounds_once() -> None:
    x = np.random.default_rng(0).integers(-(2**16) + 1, 2**16, (3, 64))
    angles = np.outer([0, 5, 32767], np.geomspace(1, 1e-4, 32))
    cos, sin = (np.tile(np.rint(f(angles) * 2**14), 2).astype(np.int32) for f in (np.cos, np.sin))
    pairs = (x[:, :32] + 1j * x[:, 32:]) * np.exp(1j * angles)
    exact = np.concatenate([pairs.real, pairs.imag], axis=-1)
    assert np.abs(integer.rotary_embedding(x, cos, sin) - exact).max() <= 0.5 + 2**16 * 2.0**-14


# --------------------------------------------------------------------------- activations


def sigmoid(x: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-x))
    return result


ERF = np.vectorize(math.erf)


@pytest.mark.parametrize("unit", (2**10, 2**14, 2**20))
def test_sigmoid_and_tanh(unit: int) -> None:
    x = np.unique(np.rint(np.linspace(-20, 20, 50_001) * unit)).astype(np.int32)
    assert np.abs(integer.sigmoid(x, unit) / 2.0**15 - sigmoid(x / unit)).max() <= 1.4e-4
    assert np.abs(integer.tanh(2 * x, 2 * unit) / 2.0**15 - np.tanh(x / unit)).max() <= 2.7e-4
    y = integer.sigmoid(x, unit)
    assert (np.diff(y) >= 0).all() and (y[0], y[-1]) == (0, 2**15)


ACTIVATIONS: list[tuple[str, Callable[[Array], Array]]] = [
    ("silu", lambda x: x * sigmoid(x)),
    ("gelu", lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2),
    ("gelu_tanh", lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2),
]


@pytest.mark.parametrize(("name", "exact"), ACTIVATIONS)
@pytest.mark.parametrize("unit", (2**11, 2**16, 2**24))
def test_silu_and_gelu(name: str, exact: Callable[[Array], Array], unit: int) -> None:
    x = np.unique(np.rint(np.linspace(-24, 24, 40_001) * unit)).astype(np.int32)
    y = integer.activation(name, x, unit) / unit
    assert np.abs(y - exact(x / unit)).max() <= 2.6e-4 + 0.5 / unit
    far = np.array([-(2**29), 2**29])
    np.testing.assert_array_equal(integer.activation(name, far, unit), [0, 2**29])
