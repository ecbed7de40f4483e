"""SmoothQuant: its formula, its floors, and equivalence."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.errors import UserError
from qcompile.passes.os_plus import OsPlus
from qcompile.passes.outlier_suppression import OutlierSuppression
from qcompile.passes.smoothquant import SmoothQuant, smoothing
from tests.passes.planted import bench, difference, inputs, normed, outlier_norm
from tests.passes.test_os_plus import TOLERANCE, equivalent


@pytest.mark.parametrize("alpha", (0.0, 0.5, 0.85, 1.0))
def test_the_scale_is_the_formula_over_all_siblings(alpha: float) -> None:
    gamma, beta = outlier_norm()
    with bench(normed(gamma, beta, readers=2), inputs()) as found:
        before = found.outputs()
        weights = np.maximum(*(np.abs(found.constant(f"fc{i}.weight")).max(axis=1) for i in (0, 1)))
        entry = found.run(SmoothQuant(alpha=alpha))
        lo, hi = np.array(entry.facts["channel_ranges"]["norm:norm"]["before"])
        scale = gamma / found.constant("norm.weight")
        after = found.outputs()
    expected = np.maximum(np.abs(lo), np.abs(hi)) ** alpha / weights ** (1 - alpha)
    np.testing.assert_allclose(scale, expected, rtol=1e-4)
    assert difference(before, after) < TOLERANCE
    assert entry.rewrites == 1 and entry.sites[0]["nodes_added"] == 0 and "loss_after" not in entry.sites[0]


def test_dead_channels_and_zero_rows_stay_finite() -> None:
    scale = smoothing(np.array([0.0, 0.0, 4.0]), np.array([0.0, 1.0, 0.0]), 0.5)
    np.testing.assert_allclose(scale, [1.0, 1e-5**0.5, 2 / 1e-5**0.5], rtol=1e-5)
    gamma, beta = outlier_norm()
    gamma[4] = beta[4] = 0.0
    with bench(normed(gamma, beta), inputs()) as found:
        before = found.outputs()
        found.run("smoothquant")
        assert difference(before, found.outputs()) < TOLERANCE


@pytest.mark.parametrize("recipe", ("w8a8_static", "w4a4_static", "w6a6"))
def test_the_searched_alpha_is_never_worse_than_leaving_the_site_alone(recipe: str) -> None:
    for seed in range(3):
        with bench(normed(*outlier_norm(seed)), inputs(seed=seed), recipe) as found:
            site = found.run("smoothquant{search=1}").sites[0]
        assert 0.3 <= site["alpha"] <= 0.9 and site["loss_after"] < site["loss_before"]


def test_an_alpha_outside_its_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"alpha is 1.5, but must lie in 0..1"):
        SmoothQuant(alpha=1.5)


@pytest.mark.parametrize("name", ("bert", "bloom", "phi", "t5"))
def test_architectures_keep_their_function(name: str) -> None:
    equivalent(name, "smoothquant{v_o=1 up_down=1}")


def test_by_default_only_norms_are_used() -> None:
    with bench(normed(*outlier_norm()), inputs()) as found:
        assert SmoothQuant().kinds() == ["norm"]
        assert [s["site"] for s in found.run("smoothquant").sites] == ["norm:norm"]


def test_options_of_one_name_mean_the_same_in_every_transform() -> None:
    assert (OsPlus().kinds(), OsPlus().how()) == (["norm", "v_o", "up_down"], "auto")
    assert (OsPlus(norm=False, mode="fold").kinds(), OsPlus(mode="fold").how()) == (["v_o", "up_down"], "fold")
    assert (SmoothQuant(v_o=True).kinds(), SmoothQuant(mode="insert").how()) == (["norm", "v_o"], "insert")
    assert (OutlierSuppression().kinds(), OutlierSuppression().how()) == (["norm"], "fold")  # has neither option


@pytest.mark.parametrize("name", ("llama", "mixtral"))
def test_grouped_heads_gates_and_experts(name: str) -> None:
    assert equivalent(name, "smoothquant{v_o=1 up_down=1}") >= {"norm", "v_o"}
