"""Observers: what each finds, in memory that does not grow, at real tokens only."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.calibration.observers import (
    AverageMinMax,
    ChannelRange,
    LogHistogram,
    MeanSquaredError,
    MinMax,
    Percentile,
    TokenWise,
    observe,
    sequences,
)
from qcompile.calibration.ranges import ChannelEnergy, Ranges, calibrate, make_observer, outlier_columns
from qcompile.calibration.samples import Sample
from qcompile.errors import UserError
from qcompile.graph.sites import find_linears
from qcompile.models.architectures import cached_export
from qcompile.quant.numerics import affine_from_range, fake_quantize
from qcompile.quant.schemes import OBSERVERS, ActivationScheme
from tests.passes.planted import Bench, bench, inputs, normed, outlier_norm

Array = np.ndarray
KINDS: dict[str, Callable[[], Any]] = {
    "minmax": MinMax,
    "avg_minmax": AverageMinMax,
    "percentile": Percentile,
    "mse": lambda: MeanSquaredError(8, symmetric=False),
    "token_wise": TokenWise,
    "channel_range": ChannelRange,
    "channel_energy": ChannelEnergy,
}


def rows(tokens: int = 64, channels: int = 16, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_t(3, (tokens, channels)).astype(np.float32)


def fed(observer: Any, *parts: Array) -> Any:
    for part in parts:
        observer.update(part)
    return observer


# --------------------------------------------------------------------------- the sketch


@pytest.mark.parametrize("growth", (1.02, 1.002))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), scale=st.floats(-6, 6), q=st.sampled_from((0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0)))
def test_a_quantile_is_right_to_half_a_bin(growth: float, seed: int, scale: float, q: float) -> None:
    values = (10**scale * np.random.default_rng(seed).standard_t(2, 999)).astype(np.float32)
    exact = float(np.sort(values)[int(q * 998)])
    found = fed(LogHistogram(growth), *np.array_split(values, 7)).quantile(q)
    assert abs(found - exact) <= (growth - 1) * 0.51 * abs(exact) + LogHistogram.SMALLEST


def test_the_sketch_keeps_zeros_signs_and_ends() -> None:
    sketch = fed(LogHistogram(), np.array([0, 0, 0, -1e-12, 1e30, -1e30, 1.0], np.float32))
    assert sketch.counts.sum() == 7 and sketch.quantile(0.5) == 0
    assert sketch.quantile(0) < -9e8 and sketch.quantile(1) > 9e8 and LogHistogram().quantile(0.5) == 0


# --------------------------------------------------------------------------- what they find


@pytest.mark.parametrize("kind", KINDS)
def test_size_does_not_grow_with_samples(kind: str) -> None:
    few, many = fed(KINDS[kind](), rows()), KINDS[kind]()
    for seed in range(50):
        many.update(rows(200, seed=seed))
    assert len(pickle.dumps(many)) <= len(pickle.dumps(few)) + 64


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_without_real_tokens_changes_nothing(kind: str) -> None:
    plain, other = fed(KINDS[kind](), rows()), fed(KINDS[kind](), rows(), rows()[:0])
    assert pickle.dumps(plain) == pickle.dumps(other)


@pytest.mark.parametrize("kind", ("minmax", "avg_minmax", "percentile", "mse", "token_wise"))
def test_ranges_hold_zero_and_lie_in_what_was_seen(kind: str) -> None:
    for shift in (-40.0, 0.0, 40.0):
        seen = rows() + np.float32(shift)
        lo, hi = fed(KINDS[kind](), seen).range()
        assert min(seen.min(), 0) <= lo <= 0 <= hi <= max(seen.max(), 0) and lo < hi


def test_avg_minmax_is_the_mean_over_sequences() -> None:
    parts = [rows(n, seed=n) for n in (3, 10, 50)]
    lo, hi = fed(AverageMinMax(), *parts).range()
    assert lo == pytest.approx(np.mean([p.min() for p in parts]), rel=1e-6)
    assert hi == pytest.approx(np.mean([p.max() for p in parts]), rel=1e-6)


def test_percentile_drops_its_share_of_the_tails() -> None:
    values = np.random.default_rng(0).standard_normal((5000, 20)).astype(np.float32)
    values[0, 0] = 500
    lo, hi = fed(Percentile(keep=0.99), values).range()
    assert lo == pytest.approx(np.quantile(values, 0.005), rel=0.02)
    assert hi == pytest.approx(np.quantile(values, 0.995), rel=0.02)


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("bits", (4, 6, 8))
def test_mse_is_close_to_the_best_clip(bits: int, symmetric: bool) -> None:
    values = rows(2000, 16)

    def error(lo: float, hi: float) -> float:
        y = fake_quantize(values, affine_from_range(lo, hi, bits, symmetric, signed=False))
        return float(np.square(y - values, dtype=np.float64).sum())

    lo, hi = float(values.min()), float(values.max())
    limits = max(-lo, hi) * np.geomspace(1, 0.02, 200)
    best = min(error(max(lo, -limit), min(hi, limit)) for limit in limits)
    found = error(*fed(MeanSquaredError(bits, symmetric), values).range())
    assert found <= 1.1 * best and found < (0.98 if bits == 8 else 0.8) * error(lo, hi)


def test_token_wise_clips_by_tokens_not_by_values() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (200, 64)).astype(np.float32)
    values[:4] *= 100  # four special tokens, all of their values large
    found = fed(TokenWise(), values)
    assert found.clipped(1.0) == (values.min(), values.max()) == found.range()
    lo, hi = found.clipped(0.97)
    assert lo == pytest.approx(np.sort(values.min(axis=1))[5], rel=0.005)
    assert hi == pytest.approx(np.sort(values.max(axis=1))[-6], rel=0.005)
    widths = [np.subtract(*found.clipped(alpha)[::-1]) for alpha in (1.0, 0.99, 0.9, 0.5, 0.1)]
    assert widths == sorted(widths, reverse=True)


def test_channel_figures_are_those_of_numpy() -> None:
    parts = rows(30), rows(7, seed=1)
    together = np.concatenate(parts)
    channels, energy = fed(ChannelRange(), *parts), fed(ChannelEnergy(), *parts)
    np.testing.assert_array_equal(channels.lo, together.min(axis=0))
    np.testing.assert_array_equal(channels.absmax, np.abs(together).max(axis=0))
    square = np.square(together, dtype=np.float64)
    expected = (square / square.sum(axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(energy.mean, expected, rtol=1e-5)
    assert ChannelEnergy().mean is None
    assert outlier_columns(channels, 3.0).tolist() == np.flatnonzero(np.abs(together).max(axis=0) >= 3).tolist()


# --------------------------------------------------------------------------- masks


def padded() -> tuple[Array, Array, list[Array]]:
    """A value (2, 5, 6) whose padding is far out, its mask, and the real rows of each sequence."""
    value = rows(10, 6).reshape(2, 5, 6)
    mask = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]], bool)
    value[~mask] = 1e4
    return value, mask, [value[0], value[1, 1:3]]


def views() -> Iterator[Any]:
    value, mask, real = padded()
    heads = value.reshape(2, 5, 3, 2).transpose(0, 2, 1, 3)
    yield pytest.param(value, mask, real, id="[B,S,C]")
    yield pytest.param(value.reshape(10, 6), mask, real, id="[B*S,C]")
    yield pytest.param(heads, mask, real, id="[B,H,S,d]")
    yield pytest.param(value[:1], mask[:1], real[:1], id="[1,S,C]")
    yield pytest.param(value[:, 0], mask, [value[:, 0]], id="[B,C] whole")
    yield pytest.param(value, None, [value.reshape(10, 6)], id="no mask")
    yield pytest.param(value.astype(np.float16), None, [value.reshape(10, 6).astype(np.float16)], id="float16")
    yield pytest.param(np.float32(3), mask, [np.array([[3.0]])], id="a number")


@pytest.mark.parametrize(("value", "mask", "expected"), list(views()))
def test_only_real_tokens_are_handed_over(value: Array, mask: Array | None, expected: list[Array]) -> None:
    found = list(sequences(value, mask))
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted.astype(np.float32))


def ranges_of(found: Bench, samples: list[Sample], scheme: ActivationScheme) -> dict[str, tuple[Array, Array]]:
    names = {str(linear.x.name): scheme for linear in find_linears(found.model.graph)}
    seen = calibrate(found.ctx, found.model, names, [], samples)
    return {name: (a.scale, a.zero_point) for name in names for a in (seen.affine(name, scheme, 0.9),)}


@pytest.mark.parametrize("name", ("bert", "llama"))
def test_padding_does_not_move_a_range(name: str) -> None:
    """Padded batches halve what other tools reach; here every observer finds the same range."""
    generator = np.random.default_rng(0)
    sentences = [generator.integers(3, 256, n) for n in (5, 9, 12)]
    alone = [
        Sample({"input_ids": s[None], "attention_mask": np.ones((1, len(s)), np.int64)}, np.ones((1, len(s)), bool))
        for s in sentences
    ]
    ids, mask = np.zeros((3, 16), np.int64), np.zeros((3, 16), np.int64)
    for row, s in enumerate(sentences):
        ids[row, : len(s)], mask[row, : len(s)] = s, 1
    batch = [Sample({"input_ids": ids, "attention_mask": mask}, mask.astype(bool))]
    with bench(cached_export(name)) as found:
        for observer in OBSERVERS:
            scheme = ActivationScheme(bits=8, observer=observer)  # type: ignore[arg-type]
            left, right = ranges_of(found, alone, scheme), ranges_of(found, batch, scheme)
            assert len(left) > 4
            for key, (scale, zero) in left.items():
                # equal up to the order of float sums; one bin of the sketch where a value sits on its edge
                np.testing.assert_allclose(
                    right[key][0], scale, rtol=2.1e-2 if observer == "percentile" else 3e-3, err_msg=f"{observer} {key}"
                )
                assert abs(int(right[key][1]) - int(zero)) <= (2 if observer == "percentile" else 1)


# --------------------------------------------------------------------------- bad calibration


@pytest.mark.parametrize(("bad", "what"), [(np.nan, "NaN"), (np.inf, "infinities"), (-np.inf, "infinities")])
def test_an_activation_that_is_not_finite_is_named(bad: float, what: str) -> None:
    samples = inputs()
    samples[1].feeds["x"][0, 3, 2] = bad
    with bench(normed(*outlier_norm()), samples) as found, pytest.raises(UserError) as caught:
        observe(found.ctx, found.model, {"x": [MinMax()]})
    assert f"'x' holds {what}" in str(caught.value)


def test_what_is_not_finite_under_the_mask_does_not_matter() -> None:
    (sample,) = inputs(1)
    mask = np.ones((1, 24), bool)
    mask[0, 20:] = False
    sample.feeds["x"][0, 20:] = np.nan
    with bench(normed(*outlier_norm()), [Sample(sample.feeds, mask)]) as found:
        seen = MinMax()
        observe(found.ctx, found.model, {"normed": [seen]})
    assert np.isfinite(seen.range()).all()


@pytest.mark.parametrize("masked", (False, True))
def test_no_sample_and_no_real_token_are_refused(masked: bool) -> None:
    samples = [Sample(inputs(1)[0].feeds, np.zeros((1, 24), bool))] if masked else []
    with bench(normed(*outlier_norm()), inputs()) as found:
        static = {"normed": ActivationScheme(bits=8)}
        with pytest.raises(UserError, match="no calibration sample reaches 'normed'"):
            calibrate(found.ctx, found.model, static, [], samples)


# --------------------------------------------------------------------------- ranges by scheme


def test_channel_groups_are_of_like_range() -> None:
    seen = rows(50, 12) * np.array([1, 100, 1, 10, 1, 10, 100, 1, 10, 10, 1, 100], np.float32)
    ranges = Ranges({"x": fed(ChannelRange(), seen)}, {})
    scheme = ActivationScheme(bits=8, granularity="channel_group", groups=3)
    affine = ranges.affine("x", scheme)
    assert affine.scale.shape == (12,) and np.unique(affine.scale).size == 3
    assert (np.abs(fake_quantize(seen, affine) - seen) <= 1.001 * affine.scale).all()
    assert ranges.affine("x", scheme.model_copy(update={"groups": 40})).scale.shape == (12,)


def test_channels_kept_in_float_do_not_stretch_the_range() -> None:
    seen = np.clip(rows(50, 8), -3, 3)
    seen[:, 5] *= 1000
    ranges = Ranges({"x": fed(ChannelRange(), seen)}, {})
    affine = ranges.affine("x", ActivationScheme(bits=8, outlier_threshold=6.0))
    assert affine.scale.shape == () and affine.scale < 6.01 / 255
    everything = ranges.affine("x", ActivationScheme(bits=8, outlier_threshold=1e-6))
    assert np.isfinite(everything.scale)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_that_may_be_named_is_made(observer: str) -> None:
    scheme = ActivationScheme.model_validate({"bits": 8, "observer": observer})
    assert type(make_observer(scheme)) is type(KINDS[observer]())


def test_names_in_errors_are_the_users() -> None:
    with bench(normed(*outlier_norm()), inputs()) as found:
        next(iter(found.model.graph)).outputs[0].name = "renamed"
        with pytest.raises(UserError, match="reaches 'normed'"):
            observe(found.ctx, found.model, {"renamed": [MinMax()]}, [])
