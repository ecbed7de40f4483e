"""Learned clips: each block comes nearer to the float model, in the program as in the loop; the rest is told."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompile.block.quantisers import WeightClip
from qcompile.errors import UserError
from qcompile.graph.linears import find_linears
from qcompile.models.architectures import cached_export
from qcompile.quant.numerics import QuantizedWeight
from tests.block.stacks import planted, samples
from tests.passes.planted import bench
from tests.passes.test_quantise import check_codes_reach_the_program

EQUAL = 1e-3  # the loop's error and ONNX Runtime's, relative: roundings of activations flip; measured: at most 1e-4


@pytest.mark.parametrize(("name", "recipe"), [("llama", "w3a16_g32"), ("opt", "w4a8_static")])
def test_each_block_gains_and_its_codes_reach_the_program(name: str, recipe: str) -> None:
    with bench(cached_export(name), recipe=recipe) as found:
        entry = found.run("lwc{epochs=8 step_tokens=1 rate=0.05}")
        assert len(entry.sites) == 2
        for block in entry.sites:
            assert block["learned"] <= block["start"]
            assert block["error"] < block["plain"]
            assert block["notes"] == []
        assert sum(b["learned"] for b in entry.sites) < 0.95 * sum(b["start"] for b in entry.sites)
        linears = [linear for linear in find_linears(found.model.graph) if not linear.is_head]
        assert entry.rewrites == len(linears) >= 12
        check_codes_reach_the_program(found, linears)


def test_what_the_loop_measures_is_what_onnxruntime_runs() -> None:
    """A learned block's error, relative to its targets, in the loop and with the codes in the quantised block."""
    targets = {"layers.0": "x1", "layers.1": "x2"}
    with bench(planted("x1 = Add (x0, b0)"), samples(), recipe="w3a16") as found:
        runs = list(found.ctx.runner.stream(found.model, found.ctx.samples, list(targets.values())))
        entry = found.run("lwc{epochs=4 step_tokens=1 rate=0.05}")
    kept = {skip.site for skip in entry.skips}
    learned = [block for block in entry.sites if block["site"] not in kept]
    assert learned
    for block in learned:
        unit = np.mean([np.square(values[targets[block["site"]]], dtype=np.float64).mean() for _, values in runs])
        assert block["error"] == pytest.approx(block["learned"] * unit, rel=EQUAL)


def test_a_rate_that_ruins_everything_leaves_no_block_worse() -> None:
    with bench(cached_export("opt"), recipe="w4a16") as found:
        before = {linear.name: np.array(linear.w) for linear in find_linears(found.model.graph)}
        entry = found.run("lwc{epochs=2 step_tokens=1 rate=1e6}")
        left = {skip.site for skip in entry.skips if "brings it no nearer" in skip.reason}
        assert all(block["error"] <= block["plain"] * (1 + 1e-6) for block in entry.sites)
        for linear in find_linears(found.model.graph):
            if any(linear.name.startswith(site) for site in left):
                np.testing.assert_array_equal(linear.w, before[linear.name])


def test_clips_that_lose_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that are all zero lose against plain rounding: the float weights come back, and the reason is told."""
    codes = WeightClip.codes

    def ruined(clip: WeightClip, w: torch.Tensor) -> QuantizedWeight:
        weight = codes(clip, w)
        weight.codes[:] = 0
        return weight

    monkeypatch.setattr(WeightClip, "codes", ruined)
    with bench(planted("x1 = Add (x0, b0)"), samples(), recipe="w4a16") as found:
        before = {linear.name: np.array(linear.w) for linear in find_linears(found.model.graph)}
        entry = found.run("lwc{epochs=1 step_tokens=1}")
        assert entry.rewrites == 0
        reasons = {skip.site: skip.reason for skip in entry.skips if skip.site.startswith("layers.")}
        told = "lwc brings it no nearer to the float model than it was"
        assert reasons == {"layers.0": told, "layers.1": told}
        for linear in find_linears(found.model.graph):
            np.testing.assert_array_equal(linear.w, before[linear.name])


def test_a_block_that_cannot_be_differentiated_is_named_and_the_rest_is_learned() -> None:
    model = planted("h0 = Hardmax (b0) x1 = Add (x0, h0)")
    with bench(model, samples(), recipe="w3a16") as found:
        entry = found.run("lwc{epochs=2 step_tokens=1 rate=0.05}")
    (skip,) = (skip for skip in entry.skips if skip.site == "layers.0")
    assert skip.reason == "operator Hardmax cannot be learned through: it has no differentiable translation"
    assert skip.node == "layers.0: h0"
    assert entry.rewrites == 2


def test_the_same_seed_gives_the_same_codes() -> None:
    def codes(model: ir.Model) -> list[np.ndarray]:
        with bench(model, samples(), recipe="w3a16") as found:
            found.run("lwc{epochs=2 step_tokens=1 rate=0.05}")
            return [np.array(linear.w) for linear in find_linears(found.model.graph)]

    first, second = codes(planted("x1 = Add (x0, b0)")), codes(planted("x1 = Add (x0, b0)"))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError(distribution)

    with bench(planted("x1 = Add (x0, b0)"), samples(), recipe="w3a16") as found:
        monkeypatch.setattr(importlib.metadata, "version", missing)
        with pytest.raises(UserError, match="torch is not installed") as caught:
            found.run("lwc")
    assert "qcompile-nn[torch]" in caught.value.hint
