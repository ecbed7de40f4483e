"""Round to nearest: clips by the energy of the inputs, never worse than the whole range, codes kept."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.graph.linears import find_linears
from qcompile.models.architectures import cached_export
from qcompile.quant.schemes import WeightScheme
from qcompile.recipe import load
from tests.passes.planted import bench, inputs
from tests.passes.test_gptq import shared, with_scheme
from tests.passes.test_quantise import check_codes_reach_the_program


@pytest.mark.parametrize("name", ("bert", "llama"))
@pytest.mark.parametrize("recipe", ("w4a16", "w2a16_g32", "w4a4"))
def test_each_linear_gains_and_its_codes_reach_the_program(name: str, recipe: str) -> None:
    with bench(cached_export(name)) as found:
        found.ctx.recipe = load(recipe)
        entry = found.run("rtn")
        assert entry.rewrites == len(entry.sites) >= 7
        assert all(site["error_after"] < site["error_before"] for site in entry.sites if "int8" not in site["weights"])
        check_codes_reach_the_program(found, [x for x in find_linears(found.model.graph) if not x.is_head])


def test_the_energy_of_the_inputs_decides_what_is_cut() -> None:
    """Half of the inputs hardly move: with ``energy`` the other rows come out nearer."""
    samples = inputs()
    for sample in samples:
        sample.feeds["x"][..., ::2] *= 1e-3
    errors = []
    for energy in (0, 1):
        with bench(shared(1), samples) as found:
            found.ctx.recipe = with_scheme(WeightScheme(bits=2, symmetric=False))
            (linear,) = find_linears(found.model.graph)
            before = np.array(linear.w)
            found.run(f"rtn{{energy={energy}}}")
            errors.append(np.square(np.asarray(linear.w) - before)[1::2].sum())
    assert errors[1] < 0.9 * errors[0]


def test_a_scheme_without_clip_keeps_its_range() -> None:
    with bench(shared(2), inputs()) as found:
        found.ctx.recipe = with_scheme(WeightScheme(bits=3, clip="minmax"))
        entry = found.run("rtn")
    assert entry.rewrites == 1 and entry.sites[0]["error_after"] == entry.sites[0]["error_before"] > 0
