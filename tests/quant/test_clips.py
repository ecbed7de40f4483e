"""The search for clips: what it promises, and that it finds what lies there."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.quant.clips import groups_of, search_clips
from qcompile.quant.numerics import QuantizedWeight, quantize_weight
from qcompile.quant.schemes import WeightScheme

Array = np.ndarray
SCHEMES = [
    WeightScheme(bits=bits, granularity="group" if group else "per_channel", group_size=group, symmetric=symmetric)
    for bits in (2, 3, 4)
    for group in (None, 32, 40, 500)
    for symmetric in (True, False)
]


def tailed(k: int = 96, n: int = 24, seed: int = 0) -> Array:
    """Weights with a long tail on one side of each column."""
    generator = np.random.default_rng(seed)
    w = generator.standard_normal((k, n)) + 0.6 * generator.exponential(1.0, (k, n)) ** 2
    return np.asarray(w * generator.choice([-1, 1], n), np.float32)


def by_group(w: Array, weight: QuantizedWeight, scheme: WeightScheme, energy: Array) -> Array:
    """Weighted squared error of each group and column."""
    square = np.square(w - weight.dequantized()) * energy[:, None]
    rows = groups_of(len(w), scheme)
    return np.stack([square[rows == group].sum(axis=0) for group in range(rows[-1] + 1)])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_group_of_a_column_is_worse_than_with_its_range(scheme: WeightScheme) -> None:
    w, energy = tailed(), np.random.default_rng(1).uniform(0.1, 3, 96).astype(np.float32)
    levels = search_clips(w, scheme, energy)
    found = levels.packed(levels.nearest(w), scheme)
    whole = quantize_weight(w, scheme.model_copy(update={"clip": "minmax"}))
    assert found.scale.shape == whole.scale.shape and found.zero_point.dtype == whole.zero_point.dtype
    assert found.group_size == whole.group_size and found.codes.dtype == np.int8
    before, after = (by_group(w, weight, scheme, energy) for weight in (whole, found))
    assert (after <= before * (1 + 1e-5)).all() and after.sum() < (0.97 if scheme.bits == 4 else 0.9) * before.sum()
    np.testing.assert_array_equal(levels.values(found.codes), found.dequantized())


def test_the_ends_are_searched_apart() -> None:
    """A single tail on one side: cutting both ends alike cuts what is not there to be cut."""
    scheme = WeightScheme(bits=3, symmetric=False)
    w = tailed()
    levels = search_clips(w, scheme, None)
    alike = quantize_weight(w, scheme)
    error, other = (np.square(w - v).sum() for v in (levels.values(levels.nearest(w)), alike.dequantized()))
    assert error < 0.97 * other


def test_rows_without_energy_do_not_matter() -> None:
    scheme = WeightScheme(bits=2, symmetric=False)
    w, energy = tailed(), np.ones(96, np.float32)
    energy[::2] = 0
    levels, alone = search_clips(w, scheme, energy), search_clips(w[1::2], scheme, None)
    reached = [np.square(w[1::2] - one.values(one.nearest(rows))[part]).sum()
               for one, rows, part in ((levels, w, slice(1, None, 2)), (alone, w[1::2], slice(None)))]  # fmt: skip
    plain = search_clips(w, scheme, None)
    assert reached[0] < np.square(w - plain.values(plain.nearest(w)))[1::2].sum()
    assert reached[0] < 1.15 * reached[1]


def test_a_scheme_without_clip_keeps_the_range() -> None:
    scheme = WeightScheme(bits=4, clip="minmax", granularity="group", group_size=32)
    levels, whole = search_clips(tailed(), scheme, None), quantize_weight(tailed(), scheme)
    np.testing.assert_array_equal(levels.scale, whole.scale)
    np.testing.assert_array_equal(levels.nearest(tailed()), whole.codes)
