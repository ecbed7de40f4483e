"""AWQ: an equivalence that makes rounding hurt less, at every kind of site."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.calibration import objective
from qcompile.calibration.ranges import calibrate
from qcompile.graph.linears import find_linears
from qcompile.models.architectures import cached_export
from qcompile.passes.awq import awq_scale
from qcompile.quant.numerics import fake_quantize_weight
from qcompile.quant.schemes import WeightScheme
from qcompile.recipe import load
from tests.passes.planted import bench, difference, inputs, normed, outlier_norm
from tests.passes.test_os_plus import TOLERANCE


@pytest.mark.parametrize("name", ("bert", "gpt2", "llama", "t5"))
def test_architectures_keep_their_function(name: str) -> None:
    with bench(cached_export(name), recipe="w3a16_g32") as found:
        before = found.outputs()
        entry = found.run("awq{mode=fold points=4}")
        assert entry.rewrites >= 2 and difference(before, found.outputs()) < TOLERANCE
        assert all(site["loss_after"] < site["loss_before"] for site in entry.sites)
        assert all(0 < site["exponent"] < 1 for site in entry.sites)


def test_rounding_hurts_less_after_it() -> None:
    errors = {}
    for passes in (("rtn",), ("awq", "rtn")):
        with bench(normed(*outlier_norm()), inputs(), "w3a16_g32") as found:
            before = found.outputs()
            for one in passes:
                found.run(one)
            errors[passes[0]] = float(np.square(found.outputs()[0] - before[0]).mean())
    assert errors["awq"] < 0.8 * errors["rtn"], errors


def test_the_search_clips_as_quantise_will(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the energy of the inputs as the scale leaves them."""
    energies: list[Any] = []

    def recorded(w: np.ndarray, scheme: WeightScheme, energy: np.ndarray | None = None) -> np.ndarray:
        energies.append(energy)
        return fake_quantize_weight(w, scheme, energy)

    monkeypatch.setattr(objective, "fake_quantize_weight", recorded)
    with bench(normed(*outlier_norm()), inputs(), "w3a16_g32") as found:
        linear = find_linears(found.model.graph)[0]
        plain: Any = calibrate(found.ctx, found.model, {}, [str(linear.x.name)]).energy(str(linear.x.name))
        found.run("awq")
        linear = find_linears(found.model.graph)[0]
        scaled: Any = calibrate(found.ctx, found.model, {}, [str(linear.x.name)]).energy(str(linear.x.name))
    np.testing.assert_allclose(energies[0], plain, rtol=1e-4)
    assert any(np.allclose(energy, scaled, rtol=1e-4) for energy in energies[1:]) and not np.allclose(plain, scaled)


def test_the_scale_is_a_power_around_one() -> None:
    size = np.array([0.0, 1e-3, 0.1, 10.0], np.float32)
    scale = awq_scale(size, 0.5)
    assert scale[0] == 1 and scale[1] * scale[3] == pytest.approx(1)
    np.testing.assert_allclose(scale[3] / scale[2], 10, rtol=1e-5)
    assert (awq_scale(np.zeros(3, np.float32), 0.5) == 1).all()
    extreme = awq_scale(np.array([1e-30, 1.0], np.float32), 0.9)
    assert np.log(extreme).tolist() == pytest.approx([-4, 4])


def test_a_recipe_that_keeps_the_weights_has_nothing_to_gain() -> None:
    with bench(normed(*outlier_norm()), inputs()) as found:
        found.ctx.recipe = load("float")
        skips = found.run("awq").skips
    assert [skip.reason for skip in skips] == ["weights stay float in this recipe, so nothing is gained"]
