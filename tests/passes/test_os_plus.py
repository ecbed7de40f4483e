"""Outlier Suppression+: the oracles of the method, equivalence, and that nothing is left alone in silence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompile.calibration.search import objectives, refine, search
from qcompile.graph.sites import describe, find_sites
from qcompile.models.architectures import ARCHITECTURES, cached_export
from qcompile.passes.smoothquant import smoothing
from qcompile.quant.numerics import affine_from_range, fake_quantize, fake_quantize_weight
from qcompile.quant.schemes import WeightScheme
from tests.passes.planted import Array, Bench, bench, difference, inputs, normed, outlier_norm, wide

TOLERANCE = 1e-5
NARROW = 16
RECIPES = ("w8a8_static", "w6a6_static", "w4a4_static", "w8a8", "w4a4")


def only_site(found: Bench, spec: str = "os_plus") -> dict[str, Any]:
    """What the pass did at the graph's only site."""
    entry = found.run(spec)
    assert entry.rewrites == len(entry.sites) == 1 and not entry.skips
    return entry.sites[0]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_best_threshold_is_no_worse_than_none_nor_than_leaving_the_site_alone(
    recipe: str, seed: int
) -> None:
    gamma, beta = outlier_norm(seed)
    with bench(normed(gamma, beta), inputs(seed=seed), recipe) as found:
        site = only_site(found, "os_plus{family=threshold}")
        curve = found.ctx.ledger.current.facts["search"]["norm:norm"]
    at_top = curve["loss"][int(np.argmax(curve["t"]))]
    assert site["loss_after"] <= at_top and site["loss_after"] < site["loss_before"]
    assert site["loss_after"] == min(curve["loss"])
    assert curve["best"] == site["threshold"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_power_scale_is_taken_only_where_it_beats_every_threshold(recipe: str) -> None:
    gamma, beta = outlier_norm()
    with bench(normed(gamma, beta), inputs(), recipe) as found:
        site = only_site(found)
        losses = found.ctx.ledger.current.facts["search"]["norm:norm"]["loss"]
    if site.get("rule") == "power":
        assert site["loss_after"] < min(losses) and "threshold" not in site
    else:
        assert site["loss_after"] == min(losses)


def test_where_nothing_helps_the_site_is_left_alone_and_the_ledger_says_so() -> None:
    model = normed(np.ones(NARROW), np.zeros(NARROW))
    with bench(model, inputs(channels=NARROW, symmetric=True)) as found:
        before = found.constant("fc0.weight").copy()
        entry = found.run("os_plus{t_min=1e9 family=threshold}")  # the only candidate is the range itself: no scale
        assert entry.rewrites == 0 and not entry.sites
        assert [(s.site, s.reason) for s in entry.skips] == [
            ("norm:norm", "no threshold beats leaving it alone")
        ]
        assert (found.constant("fc0.weight") == before).all()


@pytest.mark.parametrize(("baseline", "kept"), ((0.5, True), (1.0, True), (1.1, False)))
def test_a_search_that_does_not_beat_the_baseline_keeps_the_identity(baseline: float, kept: bool) -> None:
    def transform(t: float) -> tuple[Array, Array]:
        return np.full(3, 4 / t), np.full(3, t)

    def loss(t: float, scale: Array, shift: Array) -> float:
        return 1 + abs(t - 2)

    found = refine(search([4.0, 2.0, 1.0], transform, loss, baseline), 2, transform, loss)
    assert (found.scale == 1).all() == kept and (found.shift == 0).all() == kept
    assert found.baseline == baseline and found.loss == (baseline if kept else 1.0)
    assert found.parameter == 2.0 and len(found.curve) > 3


def test_only_channels_beyond_the_threshold_are_scaled() -> None:
    gamma, beta = outlier_norm()
    with bench(normed(gamma, beta), inputs()) as found:
        site = only_site(found, "os_plus{family=threshold}")
        ranges = found.ctx.ledger.current.facts["channel_ranges"]["norm:norm"]
        after = np.abs(ranges["after"]).max(axis=0)
        scale = gamma / found.constant("norm.weight")
    reach = np.subtract(ranges["before"][1], ranges["before"][0]) / 2
    assert (scale >= 1 - 1e-6).all() and site["channels_scaled"] == int((scale > 1 + 1e-6).sum())
    np.testing.assert_array_equal(scale > 1 + 1e-6, reach > site["threshold"])
    np.testing.assert_allclose(after, np.minimum(reach, site["threshold"]), rtol=1e-4)
    np.testing.assert_allclose(ranges["after"][0], np.negative(ranges["after"][1]), atol=1e-4)  # centred


def test_centred_data_has_no_shift_and_is_scaled_as_without_one() -> None:
    gamma, _ = outlier_norm()
    folded = []
    for spec in ("os_plus", "os_plus{shift=off}"):
        with bench(normed(gamma, np.zeros(len(gamma))), inputs(symmetric=True)) as found:
            site = only_site(found, spec)
            assert not site["shifted"]
            folded.append((site["threshold"], found.constant("norm.weight"), found.constant("fc0.weight")))
    for one, other in zip(*folded, strict=True):
        np.testing.assert_array_equal(one, other)


def quantised_error(found: Bench) -> float:
    """Mean squared error of the only linear in 8 bits: one range for its input, one for each output."""
    scheme = WeightScheme(bits=8, clip="minmax")
    w, total = found.constant("fc0.weight"), 0.0
    for _, values in found.ctx.runner.stream(found.model, found.ctx.samples, ["normed"]):
        x = values["normed"]
        affine = affine_from_range(x.min(), x.max(), 8, symmetric=False, signed=False)
        error = fake_quantize(x, affine) @ fake_quantize_weight(w, scheme) - x @ w
        total += float(np.square(error).mean())
    return total


def test_an_offset_changes_nothing_for_os_plus_but_costs_smoothquant() -> None:
    gamma, beta = outlier_norm()
    far = beta + np.random.default_rng(5).choice([-60.0, 60.0], beta.size)
    errors: dict[str, list[float]] = {"os_plus": [], "smoothquant": []}
    for spec, seen in errors.items():
        for offset in (beta, far):
            with bench(normed(gamma, offset), inputs()) as found:
                only_site(found, spec)
                seen.append(quantised_error(found))
    assert errors["os_plus"][1] == pytest.approx(
        errors["os_plus"][0], rel=0.2
    )  # thresholds may differ a little
    near, shifted = errors["smoothquant"]
    assert shifted > 4 * near > 4 * errors["os_plus"][0]


def test_a_channel_that_is_never_positive_is_centred() -> None:
    gamma, beta = np.ones(16), np.zeros(16)
    beta[5] = -50.0
    with bench(normed(gamma, beta), inputs(channels=16)) as found:
        site = only_site(found)
        lo, hi = (side[5] for side in found.ctx.ledger.current.facts["channel_ranges"]["norm:norm"]["before"])
        moved = beta[5] - found.constant("norm.bias")[5] * (gamma[5] / found.constant("norm.weight")[5])
    assert hi < -40 and site["range_before"] > 50 and site["range_after"] < 5
    assert moved == pytest.approx((lo + hi) / 2, rel=1e-5)


def test_padding_moves_nothing() -> None:
    gamma, beta = outlier_norm()
    plain = inputs(length=16)
    padded = []
    for sample in plain:
        x = np.zeros((1, 24, gamma.size), np.float32)
        x[:, :16] = sample.feeds["x"]
        x[:, 16:, 0] = 1e4  # after the norm: far beyond any real value of channel 0
        padded.append(type(sample)({"x": x}, np.arange(24)[None] < 16))
    folded = []
    for samples in (plain, padded):
        with bench(normed(gamma, beta), samples) as found:
            only_site(found)
            folded.append([found.constant(n) for n in ("norm.weight", "norm.bias", "fc0.weight", "fc0.bias")])
    for one, other in zip(*folded, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("recipe", ("w8a8_static", "w6a6_static", "w4a4_static"))
def test_the_methods_rank_as_in_the_synthetic_table(recipe: str) -> None:
    """Three planted channels: no transform > SmoothQuant > scale only > OS+, and shift only > OS+."""
    gamma, beta = outlier_norm(channels=64)
    samples = inputs(4, 64, 64)
    with bench(normed(gamma, beta, width=64), samples, recipe) as found:
        objective = next(iter(objectives(found.ctx, found.model, find_sites(found.model), 256)))[1]
        streamed = found.ctx.runner.stream(found.model, samples, ["normed"])
        rows = np.concatenate([values["normed"][0] for _, values in streamed])
        weights = np.abs(found.constant("fc0.weight")).max(axis=1)
    one, zero, centre = np.ones(64, np.float32), np.zeros(64, np.float32), (rows.max(0) + rows.min(0)) / 2

    def best(shift: Array) -> float:
        reach = np.abs(rows - shift).max(axis=0)
        grid = np.linspace(1.0, reach.max(), 100)
        return min(objective.loss(np.maximum(one, reach / np.float32(t)), shift, (-t, t)) for t in grid)

    naive, shifted = objective.loss(one, zero), objective.loss(one, centre)
    smooth = min(objective.loss(smoothing(np.abs(rows).max(0), weights, a), zero) for a in (0.5, 0.8))
    scaled, both = best(zero), best(centre)
    assert naive > smooth > scaled > both and naive > shifted > both
    assert both < scaled / 3  # 4 to 5 in the table


def test_the_search_quantises_as_the_recipe_does() -> None:
    """Per token each row has its own range; static, the threshold is the range."""
    gamma, beta = outlier_norm()
    results = {}
    for recipe in ("w8a8", "w8a8_static"):
        with bench(normed(gamma, beta), inputs(), recipe) as found:
            objective = next(iter(objectives(found.ctx, found.model, find_sites(found.model), 64)))[1]
        one, zero = np.ones(gamma.size, np.float32), np.zeros(gamma.size, np.float32)
        results[recipe] = [objective.loss(one, zero, limit) for limit in (None, (-0.5, 0.5))]
    assert results["w8a8"][0] == results["w8a8"][1]
    assert results["w8a8_static"][1] > 10 * results["w8a8_static"][0]


@pytest.mark.parametrize("max_drop", (None, 0.01))
def test_under_a_gate_a_static_recipe_is_searched_with_ranges_per_token(max_drop: float | None) -> None:
    gamma, beta = outlier_norm()
    with bench(normed(gamma, beta), inputs(), "w8a8_static") as found:
        found.ctx.max_drop = max_drop
        objective = next(iter(objectives(found.ctx, found.model, find_sites(found.model), 64)))[1]
        assert objective.is_static == (max_drop is None)


def test_a_residual_gets_the_original_back() -> None:
    gamma, beta = outlier_norm()
    with bench(normed(gamma, beta, readers=2, residual=True), inputs()) as found:
        before = found.outputs()
        assert only_site(found)["nodes_added"] == 2
        assert difference(before, found.outputs()) < TOLERANCE


@pytest.mark.parametrize("mode", ("fold", "insert"))
def test_a_gelu_in_between_is_skipped_or_bridged(mode: str) -> None:
    generator = np.random.default_rng(0)
    up, down = generator.standard_normal((16, 32)) / 4, generator.standard_normal((32, 16)) / 6
    up[:, 7] *= 30
    with bench(wide("Gelu", up, down), inputs(channels=16)) as found:
        before = found.outputs()
        entry = found.run(f"os_plus{{mode={mode}}}")
        assert difference(before, found.outputs()) < TOLERANCE
    if mode == "fold":
        assert [s.reason for s in entry.skips] == ["Gelu does not commute with a scale"]
    else:
        assert [s["nodes_added"] for s in entry.sites] == [1]


def test_relu_passes_a_scale() -> None:
    generator = np.random.default_rng(0)
    up, down = generator.standard_normal((16, 32)) / 4, generator.standard_normal((32, 16)) / 6
    up[:, 7] *= 30
    with bench(wide("Relu", up, down), inputs(channels=16)) as found:
        before = found.outputs()
        site = only_site(found)
        assert site["nodes_added"] == 0 and site["range_after"] < site["range_before"] / 2
        assert difference(before, found.outputs()) < TOLERANCE


def test_float_activations_are_a_reason() -> None:
    with bench(normed(*outlier_norm()), inputs(), "w4a16") as found:
        entry = found.run("os_plus")
    assert entry.rewrites == 0 and "activations stay float" in entry.skips[0].reason


def equivalent(name: str, spec: str, kinds: tuple[str, ...] = ("norm", "v_o", "up_down")) -> set[str]:
    """``spec`` keeps an architecture's outputs and accounts for every site; the kinds that were changed."""
    with bench(cached_export(name), recipe="w8a8_static") as found:
        known = {describe(site) for site in find_sites(found.model) if site.kind in kinds}
        before = found.outputs()
        entry = found.run(spec)
        assert difference(before, found.outputs()) < TOLERANCE
    accounted = [s["site"] for s in entry.sites] + [s.site for s in entry.skips]
    assert set(accounted) == known
    assert entry.rewrites == len(entry.sites) > 0
    return {s["site"].partition(":")[0] for s in entry.sites}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_keeps_its_function(name: str) -> None:
    equivalent(name, "os_plus{shift=on points=6 refine=0}")


@pytest.mark.parametrize("name", ("llama", "falcon_new", "qwen2"))
def test_grouped_heads_share_the_scale_of_their_values(name: str) -> None:
    assert "v_o" in equivalent(name, "os_plus{points=6 refine=0}")
