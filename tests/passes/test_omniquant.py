"""OmniQuant: transforms and clips together gain more than either, and a killed run goes on where it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcompile import backends
from qcompile.block import learned
from qcompile.graph.linears import find_linears
from qcompile.models.architectures import cached_export
from qcompile.planning import expand
from qcompile.recipe import by_name
from tests.passes.planted import bench
from tests.passes.test_quantise import check_codes_reach_the_program


def test_codes_reach_the_program() -> None:
    with bench(cached_export("bert"), recipe="w4a4") as found:
        entry = found.run("omniquant{epochs=4 step_tokens=1 let_rate=0.02}")
        assert all(block["error"] < block["plain"] and block["places"] == 3 for block in entry.sites)
        linears = [linear for linear in find_linears(found.model.graph) if linear.name.startswith("encoder.layer")]
        assert entry.rewrites == len(linears) + 6
        check_codes_reach_the_program(found, linears)


def test_together_they_gain_more_than_either() -> None:
    def error(passes: str) -> float:
        with bench(cached_export("llama"), recipe="w3a4") as found:
            return float(found.run(passes).sites[0]["error"])

    together = error("omniquant{epochs=6 step_tokens=1 let_rate=0.02}")
    assert together < min(error("let{epochs=6 step_tokens=1 rate=0.02}"), error("lwc{epochs=6 step_tokens=1}"))


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_a_solver_may_choose_the_codes_after_it(solver: str) -> None:
    with bench(cached_export("bert"), recipe="w4a4") as found:
        assert found.run("omniquant{epochs=4 step_tokens=1 let_rate=0.02 keep_codes=0}").rewrites
        assert found.run(solver).rewrites == 12


def learn(folder: Path | None) -> tuple[dict[str, np.ndarray], list[dict[str, object]]]:
    with bench(cached_export("bert"), recipe="w4a4") as found:
        found.ctx.resume = folder
        entry = found.run("omniquant{epochs=2 step_tokens=1 let_rate=0.02}")
        return {linear.name: np.array(linear.w) for linear in find_linears(found.model.graph)}, entry.sites


def test_a_killed_run_goes_on_behind_the_last_finished_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block dies after its fold, which changes the norm at the end of the first one."""
    weights, sites = learn(None)
    seen: list[str] = []
    choose = learned._choose

    def dying(*arguments: object) -> None:
        choose(*arguments)  # type: ignore[arg-type]
        seen.append("block")
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(learned, "_choose", dying)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path)
    again, repeated = learn(tmp_path)
    assert len(seen) == 3
    assert repeated == sites
    assert all(np.array_equal(w, weights[name]) for name, w in again.items())
    learn(tmp_path)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("passes", "recipe", "expected"),
    [
        ("omniquant", "w4a4", ["os_plus", "omniquant"]),
        ("let", "w4a16", ["awq", "let"]),
        ("smoothquant,omniquant", "w4a4", ["smoothquant", "omniquant"]),
        ("rotate,omniquant", "w4a4", ["rotate", "os_plus", "omniquant"]),
        ("omniquant{start=none}", "w4a4", ["omniquant"]),
        ("lwc", "w4a4", ["lwc"]),
    ],
)
def test_it_starts_from_a_search_where_no_transform_stands_before(
    passes: str, recipe: str, expected: list[str]
) -> None:
    names = [one.name for one in expand(passes, by_name(recipe), backends.by_name("cpu"))]
    assert names == ["canonicalise", *expected, "quantise", names[-1]]
