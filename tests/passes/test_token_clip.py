"""Token clip: a token's few largest values are cut where that is better, and left with a reason where not."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import pytest

import qcompile
from qcompile.calibration.objective import Objective
from qcompile.errors import UserError
from qcompile.models.architectures import cached_export
from qcompile.passes.token_clip import TokenClip
from qcompile.quant import numerics
from tests.passes.planted import Bench, bench


def cuts(held: Bench) -> list[float]:
    return [node.attributes["reach"].as_float() for node in held.model.graph if node.op_type == "ClipTokens"]


def test_every_place_gets_the_share_that_its_error_is_smallest_with() -> None:
    with bench(cached_export("llama"), recipe="w4a4") as held:
        entry = held.run("token_clip")
        assert entry.rewrites == len(cuts(held)) == len(entry.sites) > 2
        assert all(site["loss_after"] < site["loss_before"] for site in entry.sites)
        assert [np.float32(site["reach"]) for site in entry.sites] == [np.float32(r) for r in cuts(held)]
        places = {site["site"]: site["linears"] for site in entry.sites}
        assert places["model.layers.0.mlp.down_proj"] == 1


def test_the_graph_cuts_as_numerics_does() -> None:
    with bench(cached_export("llama"), recipe="w4a4") as held:
        held.run("token_clip{reach=0.5}")
        node = next(node for node in held.model.graph if node.op_type == "ClipTokens")
        names = [str(node.inputs[0].name), str(node.outputs[0].name)]  # type: ignore[union-attr]
        _, values = next(iter(held.ctx.runner.stream(held.model, held.ctx.samples, names)))
        before, after = (np.array(values[name]) for name in names)
        assert np.array_equal(after, numerics.clip_tokens(before, 0.5))
        assert (after != before).any(axis=-1).all()


def test_what_needs_no_cut_is_left_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objective, "turned_loss", lambda self, turn, back: 0.1)
    with bench(cached_export("llama"), recipe="w4a4") as held:
        entry = held.run("token_clip")
        assert entry.rewrites == 0 and not cuts(held)
        reasons = {skip.site: skip.reason for skip in entry.skips}
        assert "no share of its tokens' ranges" in reasons["model.layers.0.mlp.down_proj"]
        assert reasons["lm_head"] == "with 8 bits a cut loses what it gains"


@pytest.mark.parametrize(
    ("recipe", "why"), [("w4a16", "keeps its input float"), ("w4a4_static", "one range for all tokens")]
)
def test_other_recipes_have_nothing_to_cut(recipe: str, why: str) -> None:
    with bench(cached_export("llama"), recipe=recipe) as held:
        entry = held.run("token_clip")
        assert entry.rewrites == 0 and why in entry.skips[0].reason


def test_a_second_run_cuts_nothing_more() -> None:
    with bench(cached_export("llama"), recipe="w4a4") as held:
        held.run("token_clip{reach=0.9}")
        before = cuts(held)
        entry = held.run("token_clip")
        assert entry.rewrites == 0 and cuts(held) == before
        assert "its input is cut already" in {skip.reason for skip in entry.skips}


def test_a_share_outside_its_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"reach is 1\.5"):
        TokenClip(reach=1.5)


def test_a_program_with_cuts_runs_on_the_same_kernels() -> None:
    def kernels(passes: str) -> dict[str, int]:
        with qcompile.compile(cached_export("llama"), recipe="w4a4", passes=passes) as compiled:
            program = onnx.load(compiled.folder / "model.onnx", load_external_data=False)
        count = collections.Counter(node.op_type for node in program.graph.node)
        return {name: count[name] for name in ("MatMulIntegerToFloat", "MatMul", "Reshape")}

    assert kernels("token_clip{reach=0.8}") == kernels("")
