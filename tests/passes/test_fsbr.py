"""FSBR: what omniquant learns, and with act_smooth the pair inside SwiGLU, which is an equivalence as well."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.graph.gates import find_gates, fold_gate
from qcompile.models.architectures import cached_export
from tests.passes.planted import bench, difference

SAME = 1e-5  # relative to the largest output: folds in float64, cast once


@pytest.mark.parametrize(("name", "gates"), [("llama", 2), ("bert", 0)])
def test_a_scale_that_moves_inside_a_gate_changes_nothing(name: str, gates: int) -> None:
    with bench(cached_export(name)) as found:
        before, nodes = found.outputs(), len(found.model.graph)
        places = list(find_gates(found.model))
        assert len(places) == gates
        for gate in places:
            held = np.array(gate.gate.w), np.array(gate.up.w)
            scale = np.exp(np.random.default_rng(0).normal(0, 1, gate.gate.columns))
            assert fold_gate(found.model, gate, scale, found.ctx.workspace) == 2
            np.testing.assert_allclose(gate.gate.w, held[0] * scale, rtol=1e-6)
            np.testing.assert_allclose(gate.up.w, held[1] / scale, rtol=1e-6)
        assert len(found.model.graph) == nodes + 2 * gates
        assert difference(before, found.outputs()) < SAME
        assert not list(find_gates(found.model))


def test_without_the_pair_it_is_omniquant_for_longer() -> None:
    def weights(passes: str) -> list[np.ndarray]:
        with bench(cached_export("llama"), recipe="w4a4") as found:
            assert found.run(passes).rewrites
            return [tensor.const_value.numpy() for tensor in found.model.graph.initializers.values()]  # type: ignore[union-attr]

    first, second = weights("fsbr{epochs=2 step_tokens=1}"), weights("omniquant{epochs=2 step_tokens=1}")
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_pair_is_learned_where_its_factors_count_as_rounded() -> None:
    with bench(cached_export("llama"), recipe="w8a8") as found:
        before, nodes = found.outputs(), len(found.model.graph)
        entry = found.run("fsbr{epochs=6 step_tokens=1 let_rate=0.03 lwc_rate=0 act_smooth=1}")
        taken = [block for block in entry.sites if "places" in block]
        assert taken
        assert all(block["error"] > 0 and block["learned"] < block["start"] for block in taken)
        assert len(found.model.graph) == nodes + 2 * len(taken)
        assert len(list(find_gates(found.model))) == 2 - len(taken)
        assert difference(before, found.outputs()) < 0.2
