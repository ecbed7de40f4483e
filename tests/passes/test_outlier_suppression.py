"""Outlier Suppression's gamma migration: the gain leaves the norm, and everything else stays equal."""

from __future__ import annotations

import numpy as np
import pytest

from tests.passes.planted import bench, difference, inputs, normed, outlier_norm
from tests.passes.test_os_plus import TOLERANCE, equivalent


def test_the_gain_moves_into_every_reader_and_the_residual() -> None:
    gamma, beta = outlier_norm()
    gamma[9] = -0.8  # a negative gain is as good as any
    with bench(normed(gamma, beta, readers=2, residual=True), inputs()) as found:
        before, weight = found.outputs(), found.constant("fc1.weight").copy()
        entry = found.run("outlier_suppression")
        assert difference(before, found.outputs()) < TOLERANCE
        np.testing.assert_allclose(found.constant("norm.weight"), 1.0, rtol=1e-6)
        np.testing.assert_allclose(found.constant("norm.bias"), beta / gamma, rtol=1e-5)
        np.testing.assert_allclose(found.constant("fc1.weight"), weight * gamma[:, None], rtol=1e-5)
    assert entry.sites[0]["nodes_added"] == 1 and not entry.sites[0]["shifted"]
    lo, hi = entry.facts["channel_ranges"]["norm:norm"]["after"]
    assert (np.array(lo) <= np.array(hi)).all()


def test_a_gain_of_almost_zero_stays_where_it_is() -> None:
    gamma, beta = outlier_norm()
    gamma[4], gamma[5] = 1e-7, 0.0
    with bench(normed(gamma, beta), inputs()) as found:
        before = found.outputs()
        entry = found.run("outlier_suppression")
        assert difference(before, found.outputs()) < TOLERANCE
        np.testing.assert_allclose(found.constant("norm.weight")[[3, 4, 5]], [1.0, 1e-7, 0.0], rtol=1e-6)
        assert np.abs(found.constant("norm.bias")).max() < 100
    assert entry.notes == ["norm: 2 of 32 channels keep their gain"]


def test_a_norm_without_gain_is_left_alone_with_a_reason() -> None:
    with bench(normed(np.ones(32), np.zeros(32)), inputs()) as found:
        entry = found.run("outlier_suppression")
    assert entry.rewrites == 0 and [s.site for s in entry.skips] == ["norm:norm"]


@pytest.mark.parametrize("name", ("bert", "opt_post_ln", "gemma", "mixtral"))
def test_architectures_keep_their_function(name: str) -> None:
    assert equivalent(name, "outlier_suppression", ("norm",)) == {"norm"}
