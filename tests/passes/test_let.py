"""Learned changes: the model stays what it was, each block comes nearer to the float one when it is quantised."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.block.stream import reconstruct
from qcompile.errors import UserError
from qcompile.graph.linears import find_linears
from qcompile.models.architectures import cached_export
from qcompile.quant.schemes import ActivationScheme, WeightScheme
from qcompile.recipe import Recipe, Rule
from tests.block.stacks import planted, samples
from tests.passes.planted import Bench, bench, difference

SAME = 1e-5  # relative to the largest output: folds in float64, cast once
EQUAL = 1e-4  # one error, of graphs that are equal up to rounding


def weights(found: Bench) -> dict[str, np.ndarray]:
    return {linear.name: np.array(linear.w) for linear in find_linears(found.model.graph)}


def errors(found: Bench) -> list[float]:
    """Of the blocks as they are now, each on what those before it make, with the clip that was learned with."""
    alpha = found.ctx.ledger.current.facts.get("alpha", 1.0)
    found.ctx.ledger.open("again", "again", "analysis")
    return [step.error() for step in reconstruct(found.ctx, found.model, "again", alpha=alpha)]


@pytest.mark.parametrize(
    ("name", "recipe", "places"),
    [("llama", "w8a4", 4), ("bert", "w4a4", 3), ("bert", "w4a4_static", 3), ("opt", "w4a8_static", 4)],
)
def test_each_block_gains_and_the_function_stays(name: str, recipe: str, places: int) -> None:
    """Llama: RMSNorm, grouped heads; BERT: the norm stands before its block, and the residual reads it as well."""
    with bench(cached_export(name), recipe=recipe) as found:
        before, nodes = found.outputs(), len(found.model.graph)
        entry = found.run("let{epochs=6 step_tokens=1 rate=0.02}")
        assert difference(before, found.outputs()) < SAME
        assert len(entry.sites) == 2
        for block in entry.sites:
            assert block["error"] < block["plain"]
            assert block["learned"] < block["start"]
            assert block["places"] == places
            assert 1 < block["largest_scale"] < 3
            assert block["shifted"] == (name != "llama")
        assert entry.rewrites == 2 * places
        assert name == "bert" or len(found.model.graph) == nodes
        last = slice(None) if name != "bert" else slice(1, None)  # the second block scales what the first one gives
        assert errors(found)[last] == pytest.approx([block["error"] for block in entry.sites][last], rel=EQUAL)


def test_a_rate_that_ruins_everything_leaves_no_block_worse() -> None:
    with bench(cached_export("llama"), recipe="w4a4") as found:
        before = errors(found)
        entry = found.run("let{epochs=2 step_tokens=1 rate=50}")
        after = errors(found)
        left = {skip.site for skip in entry.skips if "brings it no nearer" in skip.reason}
        for block, last in zip(entry.sites, after, strict=True):
            assert last <= block["plain"] * (1 + EQUAL)
            assert block["site"] not in left or last == pytest.approx(block["plain"], rel=EQUAL)
        assert after[0] <= before[0]


def test_only_the_kinds_asked_for() -> None:
    with bench(cached_export("llama"), recipe="w4a4") as found:
        before = weights(found)
        found.run("let{epochs=2 step_tokens=1 rate=0.05 norm=0 v_o=0}")
        changed = {name.rpartition(".")[2] for name, w in weights(found).items() if not np.array_equal(w, before[name])}
        assert changed == {"up_proj", "down_proj"}


def test_codes_that_are_chosen_stay() -> None:
    with bench(cached_export("llama"), recipe="w4a16") as found:
        found.run("rtn")
        before = weights(found)
        entry = found.run("let{epochs=1 step_tokens=1}")
        assert entry.rewrites == 0
        assert {s.reason for s in entry.skips if "norm" in s.site} == {"the codes of its weights are chosen already"}
        assert all(np.array_equal(w, before[name]) for name, w in weights(found).items())


def test_the_same_seed_gives_the_same_weights() -> None:
    def learned() -> list[np.ndarray]:
        with bench(cached_export("llama"), recipe="w4a4") as found:
            assert found.run("let{epochs=2 step_tokens=1 rate=0.02}").rewrites
            return list(weights(found).values())

    first, second = learned(), learned()
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def attentive(bits: int) -> Recipe:
    """Attention's operands are quantised as well, and coarsely."""
    scheme = ActivationScheme(bits=bits)
    return Recipe(
        name="attention",
        rules=(
            Rule(weights=WeightScheme(bits=8), activations=ActivationScheme(bits=8, granularity="per_token")),
            Rule(op="attention", activations=scheme),
        ),
    )


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("kind", ["q_k", "v_o"])
def test_what_attention_reads_is_learned_where_it_is_quantised(name: str, kind: str) -> None:
    """Llama: rotary pairs share a scale, and query heads that of their key head; else the function would change."""
    others = " ".join(f"{other}=0" for other in ("norm", "v_o", "up_down", "q_k") if other != kind)
    with bench(cached_export(name)) as found:
        found.ctx.recipe = attentive(4)
        before, held = found.outputs(), weights(found)
        entry = found.run(f"let{{epochs=8 step_tokens=1 rate=0.03 {others}}}")
        assert difference(before, found.outputs()) < SAME
        assert entry.rewrites
        assert all(block["learned"] <= block["start"] and block["error"] <= block["plain"] for block in entry.sites)
        assert any(block["learned"] < block["start"] and block["error"] < block["plain"] for block in entry.sites)
        changed = {n.rpartition(".")[2] for n, w in weights(found).items() if not np.array_equal(w, held[n])}
        assert changed == {"q_k": {"k_proj", "q_proj", "key", "query"}, "v_o": {"v_proj", "o_proj", "value", "dense"}}[
            kind
        ] & {name.rpartition(".")[2] for name in held}


def test_without_it_queries_and_keys_have_nothing_to_gain() -> None:
    with bench(cached_export("llama"), recipe="w4a4") as found:
        entry = found.run("let{epochs=1 step_tokens=1}")
        reasons = {skip.reason for skip in entry.skips if skip.site.startswith("q_k")}
        assert reasons == {"queries and keys stay float in this recipe, so nothing is gained"}


def test_a_fold_after_a_fold_adds_no_node() -> None:
    """BERT's residual gets x * s + z from the first one; the second changes those constants."""
    with bench(cached_export("bert"), recipe="w4a4") as found:
        before = found.outputs()
        assert found.run("os_plus").rewrites
        nodes = len(found.model.graph)
        entry = found.run("let{epochs=3 step_tokens=1 rate=0.02}")
        assert entry.rewrites >= 3
        assert len(found.model.graph) == nodes
        assert difference(before, found.outputs()) < SAME


@pytest.mark.parametrize("option", ["epochs=0", "rate=-1", "tokens=0"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with bench(planted("x1 = Add (x0, b0)"), samples()) as found, pytest.raises(UserError, match="must be"):
        found.run(f"let{{{option}}}")
