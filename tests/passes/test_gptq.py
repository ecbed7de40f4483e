"""GPTQ: codes that reach the program, better outputs than rounding, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.calibration.draft import Draft
from qcompile.calibration.samples import Sample, load_samples
from qcompile.errors import UserError
from qcompile.graph.grids import forget_grids, grid_of
from qcompile.graph.linears import find_linears
from qcompile.models.architectures import cached_export
from qcompile.passes.gptq import Gptq
from qcompile.quant.schemes import WeightScheme
from qcompile.recipe import Recipe, Rule, load
from tests.passes.planted import Bench, bench, inputs, normed, outlier_norm, wide
from tests.passes.test_quantise import error, held, weights_of

Array = np.ndarray
GROUPED = WeightScheme(bits=3, granularity="group", group_size=32, symmetric=False)


def solved(found: Bench, recipe: str | Recipe, *passes: str) -> tuple[float, Bench]:
    """The error of the model's output after ``passes``."""
    found.ctx.recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    before = found.outputs()
    for one in passes:
        found.run(one)
    return error(before, found.outputs()), found


@pytest.mark.parametrize("name", ("bert", "llama", "t5"))
@pytest.mark.parametrize("recipe", ("w4a16", "w3a16_g32"))
def test_the_codes_of_the_solver_are_those_of_the_program_and_of_its_file(
    name: str, recipe: str
) -> None:
    with bench(cached_export(name)) as found:
        solved(found, recipe, "gptq")
        rule = found.ctx.recipe.rule("linear", "any")
        assert rule is not None and rule.weights is not None
        grids = {x.name: grid_of(x.weight, rule.weights) for x in find_linears(found.model.graph) if not x.is_head}
        assert len(grids) >= 7
        assert not Draft(found.model, found.ctx.recipe, found.ctx.workspace).inputs(), "there is no clip left to search"
        found.run("quantise")
        for model in (found.model, ir.load(found.ctx.workspace.save(found.model, "again"))):
            nodes = weights_of(model)
            for layer, grid in grids.items():
                assert grid is not None
                for index, expected in enumerate((grid.codes, grid.scale, grid.zero_point)):
                    np.testing.assert_array_equal(held(nodes[layer], index), expected)


@pytest.mark.parametrize("recipe", ("w4a16", "w3a16_g32", "w2a16_g32", "w4a4"))
def test_outputs_are_nearer_than_with_rounding(recipe: str) -> None:
    """On calibration samples; ``own`` and ``float`` fit, and with inputs quantised at run time."""
    generator = np.random.default_rng(0)
    mix = generator.standard_normal((32, 32)) * np.geomspace(1, 0.05, 32)[:, None]
    samples = [Sample({"x": (s.feeds["x"] @ mix).astype(np.float32)}) for s in inputs(4, 64)]
    up, down = generator.standard_normal((32, 96)), generator.standard_normal((96, 24)) / 10
    reached = {}
    for passes in ("rtn", "gptq{fit=own}", "gptq"):
        with bench(wide("Tanh", up, down), samples) as found:
            found.ctx.recipe = load(recipe)
            found.ctx.recipe = Recipe(name="both", rules=(*found.ctx.recipe.rules, every(found.ctx.recipe)))
            reached[passes] = solved(found, found.ctx.recipe, passes, "quantise")[0]
    assert reached["gptq{fit=own}"] < 0.85 * reached["rtn"] and reached["gptq"] < 0.75 * reached["rtn"], reached


def every(recipe: Recipe) -> Rule:
    """The rule for linears, for the last layer as well."""
    rule = recipe.rule("linear", "any")
    assert rule is not None
    return Rule(op="head", weights=rule.weights, activations=rule.activations)


@pytest.mark.parametrize("name", ("gpt2", "llama", "mixtral", "vit"))
def test_no_linear_is_worse_than_rounded_and_each_has_a_line(name: str) -> None:
    with bench(cached_export(name)) as found:
        found.ctx.recipe = load("w3a16_g32")
        found.ctx.samples = list(load_samples(found.model, None, None, max_samples=64, max_length=16))
        entry = found.run("gptq")
        assert len(entry.sites) + len(entry.skips) == len(find_linears(found.model.graph))
        assert entry.rewrites == len(entry.sites) >= 8
        assert all(0 <= site["error_after"] <= site["error_before"] for site in entry.sites)
        assert sum(s["error_after"] for s in entry.sites) < 0.82 * sum(s["error_before"] for s in entry.sites)


def shared(readers: int, gathered: bool = False) -> ir.Model:
    """x -> fc0 -> Tanh -> fc1 -> ..., all of one matrix; ``gathered``: a Gather reads it as well."""
    w = np.random.default_rng(3).standard_normal((32, 32)).astype(np.float32) / 4
    nodes, value = [], "x"
    for i in range(readers):
        nodes.append(helper.make_node("MatMul", [value, "w"], [f"product{i}"], f"fc{i}"))
        value = f"active{i}"
        nodes.append(helper.make_node("Tanh", [f"product{i}"], [value], f"act{i}"))
    outputs = [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", "seq", 32])]
    if gathered:
        nodes.append(helper.make_node("Gather", ["w", "index"], ["row"], "row"))
        outputs.append(helper.make_tensor_value_info("row", TensorProto.FLOAT, [32]))
    held_here = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.array(3), "index")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", 32])
    graph = helper.make_graph(nodes, "shared", [x], outputs, held_here)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def with_scheme(scheme: WeightScheme) -> Recipe:
    return Recipe(name="one", rules=(Rule(weights=scheme), Rule(op="head", weights=scheme)))


def test_a_matrix_of_several_linears_is_solved_once_for_all_of_them() -> None:
    with bench(shared(3), inputs()) as found:
        found.ctx.recipe = with_scheme(GROUPED)
        entry = found.run("gptq{fit=own}")
        assert entry.rewrites == 1 and len(entry.sites) == 1
        linears = find_linears(found.model.graph)
        grid = grid_of(linears[0].weight, GROUPED)
        found.run("quantise")
        assert grid is not None
        for node in weights_of(found.model).values():
            np.testing.assert_array_equal(held(node, 0), grid.codes)


def test_what_cannot_be_solved_has_a_reason() -> None:
    def reasons(model: ir.Model, recipe: Recipe, *before: str) -> list[str]:
        with bench(model, inputs()) as found:
            found.ctx.recipe = recipe
            for one in before:
                found.run(one)
            entry = found.run("gptq")
            assert entry.rewrites == 0
            return [skip.reason for skip in entry.skips]

    grouped = with_scheme(GROUPED)
    assert reasons(shared(1, gathered=True), grouped) == ["its matrix is read by more than linears"]
    assert reasons(shared(1), grouped, "rtn") == ["its codes are chosen already"]
    whole = with_scheme(WeightScheme(bits=4, granularity="per_tensor"))
    assert "one scale for the whole matrix" in reasons(shared(1), whole)[0]
    assert reasons(shared(1), Recipe(name="none")) == ["the recipe keeps it float"]
    mixed = Recipe(name="two", rules=(Rule(weights=GROUPED), Rule(op="head", weights=WeightScheme(bits=8))))
    with bench(shared(2), inputs()) as found:
        found.ctx.recipe = Recipe(
            name="two", rules=(Rule(weights=GROUPED), Rule(scope="fc1", weights=WeightScheme(bits=8)), *mixed.rules[1:])
        )
        skips = found.run("gptq").skips
    assert [skip.reason for skip in skips] == ["another linear has the same matrix in another format"]
    with bench(cached_export("gemma")) as found:
        found.ctx.recipe = load("w4a16")
        assert [s.reason for s in found.run("gptq").skips] == [
            "its matrix is an embedding's table as well, which quantise rounds"
        ]


def test_outlier_columns_stay_float_beside_the_codes() -> None:
    """LLM.int8's columns are multiplied in float: their codes read as zero, the others as chosen."""
    samples = inputs()
    for sample in samples:
        sample.feeds["x"][..., 5] = 40
    recipe = load("w4a8_static").rules[0]
    assert recipe.activations is not None and recipe.weights is not None
    acts = recipe.activations.model_copy(update={"outlier_threshold": 6.0})
    rule = Rule(op="head", weights=recipe.weights, activations=acts)
    with bench(shared(1), samples) as found:
        found.ctx.recipe = Recipe(name="outliers", rules=(rule,))
        before = found.outputs()
        found.run("gptq")
        grid = grid_of(find_linears(found.model.graph)[0].weight, recipe.weights)
        found.run("quantise")
        assert grid is not None and grid.codes[5].any()
        (node,) = weights_of(found.model).values()
        codes = held(node, 0)
        assert not codes[5].any()
        np.testing.assert_array_equal(np.delete(codes, 5, 0), np.delete(grid.codes, 5, 0))
        assert error(before, found.outputs()) < 0.2


def test_options_outside_their_range_are_refused() -> None:
    for option in ({"damping": 2.0}, {"scales": 0}, {"sweeps": -1}):
        with pytest.raises(UserError, match=f"{next(iter(option))} is"):
            Gptq(**option)


def test_biases_take_up_the_mean_error() -> None:
    """Whatever 2 bits do to single outputs, their means stay; and the bias comes back with the float weights."""
    with bench(normed(*outlier_norm()), inputs(), recipe="w2a16") as found:
        (linear,) = find_linears(found.model.graph)
        bias, (before, *_) = np.array(linear.bias), found.outputs()
        found.run("gptq")
        (after, *_), moved = found.outputs(), np.asarray(linear.bias) - bias
        assert np.abs((after - before).mean(axis=(0, 1))).mean() < 0.2 * np.abs(after - before).mean()
        assert np.abs(moved).max() > 0
        forget_grids(found.model)
        np.testing.assert_array_equal(np.asarray(linear.bias), bias)
        assert np.array_equal(found.outputs()[0], before)
