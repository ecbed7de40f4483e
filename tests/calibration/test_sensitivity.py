"""The gate: precision is spent where it holds the metric, and nowhere else."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.calibration.draft import SWITCHES, Draft
from qcompile.calibration.ranges import calibrate
from qcompile.calibration.samples import Sample
from qcompile.calibration.sensitivity import ALPHAS, _bisect, _descend, _ladder
from qcompile.ledger import Entry, Skip
from qcompile.models.architectures import cached_export
from qcompile.quant.schemes import ActivationScheme, WeightScheme
from qcompile.recipe import Recipe, Rule, by_name
from tests.passes.planted import Bench, bench

C, WIDE, SINK = 32, 48, 3
STATIC = Rule(
    weights=WeightScheme(bits=8), activations=ActivationScheme.model_validate({"bits": 8, "observer": "minmax"})
)
SIX_BITS = Rule(
    weights=WeightScheme(bits=8), activations=ActivationScheme.model_validate({"bits": 6, "granularity": "per_token"})
)
LINEARS = ("first", "up", "down", "last")
GRAPH = f"""<ir_version: 10, opset_import: ["" : 21]>
g (float[b, s, {C}] x) => (float[b, s, {C}] y) {{
    first_norm = LayerNormalization <axis = -1> (x, gain)
    first = MatMul (first_norm, first_weight)
    stream = Add (x, first)
    wide = MatMul (stream, up_weight)
    active = Relu (wide)
    down = MatMul (active, down_weight)
    sum = Add (stream, down)
    last_norm = LayerNormalization <axis = -1> (sum, gain)
    last = MatMul (last_norm, last_weight)
    y = Add (sum, last)
}}"""


def sink_model() -> ir.Model:
    """Two linears behind norms and an MLP; channel SINK inside it is 3000 at the first token alone.

    As SmolLM2's down_proj: one static scale for ``active`` leaves all other tokens nothing.
    """
    generator = np.random.default_rng(0)
    shapes = {"first_weight": (C, C), "up_weight": (C, WIDE), "down_weight": (WIDE, C), "last_weight": (C, C)}
    weights = {n: generator.standard_normal(shape) / np.sqrt(shape[0]) for n, shape in shapes.items()}
    weights["first_weight"][:, 0] = 0  # channel 0 says which token is the first
    weights["up_weight"][:, SINK], weights["up_weight"][0] = 0, 0
    weights["up_weight"][0, SINK] = 3000
    weights["down_weight"][SINK] *= 0.1  # it owns the first token: the other channels hardly matter there
    weights["gain"] = np.ones(C)
    proto = onnx.parser.parse_model(GRAPH)
    for node in proto.graph.node:
        node.name = node.output[0]
        node.input[:] = [name.replace("_weight", ".weight") for name in node.input]
    named = {name.replace("_weight", ".weight"): np.asarray(w, np.float32) for name, w in weights.items()}
    held = (onnx.numpy_helper.from_array(w, name) for name, w in named.items())
    proto.graph.initializer.extend(held)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def sequences(count: int = 6) -> list[Sample]:
    generator, found = np.random.default_rng(1), []
    for _ in range(count):
        x = generator.standard_normal((1, 20, C)).astype(np.float32)
        x[..., 0] = 0
        x[:, 0, 0] = 1
        found.append(Sample({"x": x}))
    return found


def gated(found: Bench, max_drop: float, rules: tuple[Rule, ...] = (STATIC,), options: str = "") -> tuple[Entry, Any]:
    found.ctx.recipe, found.ctx.max_drop = Recipe(name="gated", rules=rules), max_drop
    entry = found.run(f"quantise{{{options}}}")
    return entry, entry.facts["gate"]


def static_values(found: Bench) -> set[str]:
    nodes = (node for node in found.model.graph if node.op_type == "QuantizeLinear")
    return {str(node.inputs[0].name) for node in nodes if node.inputs[0] is not None}


# --------------------------------------------------------------------------- the planted site


def test_exactly_the_planted_site_is_given_precision() -> None:
    with bench(sink_model(), sequences()) as found:
        entry, gate = gated(found, 0.01)
        assert gate["exceptions"] == {"active": "uint8 per_token asymmetric dynamic"}
        assert gate["linears"] == {"active": ["down"]} and gate["metric"] == "1 - cosine similarity"
        why = "the gate keeps it in higher precision: uint8 per_token asymmetric dynamic"
        assert entry.skips == [Skip("down", why, "down")]
        without = next(step for step in gate["steps"] if step["exceptions"] == 0)
        assert gate["drop"] <= 0.01 < without["drop"]
        assert static_values(found) == {"first_norm", "stream", "last_norm"}
        dynamic = [n for n in found.model.graph if n.op_type.startswith("FakeQuantizePerToken")]
        assert [n.inputs[0].name for n in dynamic if n.inputs[0] is not None] == ["active"]
        damage = {item["activation"]: item["damage"] for item in entry.facts["sensitivity"]}
        assert damage["active"] == max(damage.values()) > 10 * sorted(damage.values())[-2]


def test_the_figure_of_the_gate_is_that_of_the_model_it_hands_over() -> None:
    with bench(sink_model(), sequences()) as found:
        before = found.outputs()
        _, gate = gated(found, 0.01)
        gaps = []
        for a, b in zip(before, found.outputs(), strict=True):
            cosine = (a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            gaps.append(float(1 - cosine.mean()))
        error = np.std(gaps, ddof=1) / np.sqrt(len(gaps))
        assert np.mean(gaps) - 1e-6 < gate["drop"] < np.mean(gaps) + 3 * error + 1e-6


def test_a_gate_that_holds_already_costs_no_site() -> None:
    with bench(sink_model(), sequences()) as found:
        entry, gate = gated(found, 10.0)
        assert gate["exceptions"] == {} and not entry.skips and len(gate["steps"]) <= 2
        assert len(static_values(found)) == 4


def test_what_per_token_cannot_hold_falls_to_float() -> None:
    with bench(sink_model(), sequences()) as found:
        before = found.outputs()
        entry, gate = gated(found, 1e-9)
        assert set(gate["exceptions"].values()) == {"float"} and len(gate["exceptions"]) == 4
        assert {skip.site: skip.reason.partition(": ")[2] for skip in entry.skips} == dict.fromkeys(LINEARS, "float")
        assert not static_values(found)
        for a, b in zip(before, found.outputs(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_gate_that_cannot_be_held_is_recorded_with_what_was_reached() -> None:
    """Two-bit weights are not the gate's to spend: no activation helps, and the driver refuses the result."""
    rules = (STATIC, Rule(scope="last", weights=WeightScheme(bits=2)))
    with bench(sink_model(), sequences()) as found:
        _, gate = gated(found, 1e-4, rules)
        assert gate["drop"] > 1e-4 == gate["max_drop"]
        assert set(gate["exceptions"].values()) == {"float"}


def test_a_recipe_without_activations_has_nothing_to_spend() -> None:
    with bench(sink_model(), sequences()) as found:
        _, gate = gated(found, 0.5, (Rule(weights=WeightScheme(bits=8)),))
        assert gate["exceptions"] == {} and gate["drop"] < 0.01


def test_a_language_model_is_gated_by_perplexity() -> None:
    with bench(cached_export("gpt2")) as found:
        found.ctx.recipe, found.ctx.max_drop = by_name("w8a8_static"), 0.5
        gate = found.run("quantise").facts["gate"]
        assert gate["metric"] == "perplexity" and gate["float"] > 1 and gate["drop"] <= 0.5


# --------------------------------------------------------------------------- one session for all trials


@pytest.mark.parametrize("rule", (STATIC, SIX_BITS))
def test_a_switched_model_is_the_model_that_would_be_built(rule: Rule) -> None:
    with bench(sink_model(), sequences(1)) as found:
        (sample,) = found.ctx.samples
        draft = Draft(found.model, Recipe(name="switched", rules=(rule,)), found.ctx.workspace)
        static = {name: scheme for name, scheme in draft.choice.activations.items() if not scheme.dynamic}
        draft.ranges = calibrate(found.ctx, found.model, static, [])
        steps, output = _ladder(draft), str(found.model.graph.outputs[0].name)
        with found.ctx.runner.opened(draft.build_switched(1.0, steps), [output]) as run:
            for moved in ([], ["active"], ["first_norm", "last_norm"], list(steps)):
                flags = np.array([name in moved for name in steps])
                switched = run({**sample.feeds, SWITCHES: flags})[output]
                choice = draft.choice.with_activation({name: steps[name] for name in moved}, draft.readers())
                stream = found.ctx.runner.stream(draft.build(choice), [sample], [output])
                np.testing.assert_allclose(switched, next(stream)[1][output], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------- bisection


@pytest.mark.parametrize("count", range(14))
def test_bisection_finds_the_shortest_prefix_wherever_it_starts(count: int) -> None:
    order: list[tuple[str, Any]] = [(f"site{i}", None) for i in range(count)]
    for needed, start in itertools.product(range(count + 1), range(count + 1)):
        tried: list[int] = []

        def drop(changes: dict[str, Any], needed: int = needed, tried: list[int] = tried) -> float:
            assert list(changes) == [name for name, _ in order[: len(changes)]]
            tried.append(len(changes))
            return 0.0 if len(changes) >= needed else 1.0

        chosen = _bisect(drop, order, 0.5, start)
        assert chosen is not None and len(chosen) == needed
        assert len(tried) == len(set(tried)) <= 2 * np.log2(max(count, 2)) + 3


@pytest.mark.parametrize("figure", (1.0, float("inf"), float("nan")))
@pytest.mark.parametrize("count", (0, 1, 2, 9))
def test_bisection_says_when_nothing_holds(count: int, figure: float) -> None:
    assert _bisect(lambda changes: figure, [(f"site{i}", None) for i in range(count)], 0.5) is None


@pytest.mark.parametrize(("bottom", "tried"), [(1.0, 4), (0.98, 6), (0.96, 7), (0.3, 10)])
def test_the_descent_finds_the_lowest_point_in_few_tries(bottom: float, tried: int) -> None:
    found = _descend(lambda alpha: abs(math.log(alpha / bottom)), ALPHAS, 2)
    assert min(found, key=lambda alpha: found[alpha]) == bottom and len(found) == tried


def test_the_descent_goes_on_behind_a_point_that_is_not_a_number() -> None:
    found = _descend(lambda alpha: math.nan if alpha == 1.0 else alpha, ALPHAS, 2)
    assert min(found, key=lambda alpha: found[alpha]) == ALPHAS[-1]
