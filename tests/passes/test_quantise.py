"""Quantise: what each recipe writes into real graphs, what it leaves alone and says so."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompile
from qcompile.calibration.draft import Draft
from qcompile.calibration.samples import Sample
from qcompile.errors import UserError
from qcompile.graph.edits import constant_array
from qcompile.graph.grids import grid_of
from qcompile.graph.linears import Linear, find_embeddings, find_linears
from qcompile.graph.provenance import remember
from qcompile.ledger import Entry
from qcompile.models.architectures import cached_export
from qcompile.quant.numerics import code_range
from qcompile.quant.schemes import ActivationScheme, WeightScheme
from qcompile.recipe import Recipe, Rule, load
from tests.passes.planted import Bench, bench, inputs, normed, outlier_norm, wide

Array = np.ndarray


@contextmanager
def quantised(
    model: ir.Model | Path, recipe: str | Recipe, samples: Sequence[Sample] = (), **options: Any
) -> Iterator[tuple[Bench, Entry, list[Array]]]:
    """``model`` after ``quantise``, its entry in the ledger, and its outputs before."""
    with bench(model, samples) as found:
        found.ctx.recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
        found.ctx.max_drop = options.pop("max_drop", None)
        before = found.outputs()
        written = " ".join(f"{key}={value}" for key, value in options.items())
        yield found, found.run(f"quantise{{{written}}}"), before


def operators(model: ir.Model, kind: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == kind]


def held(node: ir.Node, index: int) -> Array:
    array = constant_array(node.inputs[index])
    assert array is not None
    return array


def weights_of(model: ir.Model) -> dict[str, ir.Node]:
    """The DequantizeLinear of every weight, by the name of its layer."""
    found = (node for node in operators(model, "DequantizeLinear") if constant_array(node.inputs[0]) is not None)
    return {str(node.inputs[0].name).removesuffix(".weight_codes"): node for node in found if node.inputs[0]}


def check_codes_reach_the_program(found: Bench, linears: Sequence[Linear]) -> None:
    """What ``quantise`` writes for ``linears`` are the codes that a pass has chosen."""
    grids = {}
    for linear in linears:
        rule = found.ctx.recipe.for_linear(linear)
        assert rule is not None and rule.weights is not None
        grids[linear.name] = grid_of(linear.weight, rule.weights)
    found.run("quantise")
    nodes = weights_of(found.model)
    for layer, grid in grids.items():
        assert grid is not None
        np.testing.assert_array_equal(held(nodes[layer], 0), grid.codes)


def activations_of(model: ir.Model) -> dict[str, ir.Node]:
    """The QuantizeLinear of every static activation, by the name of its value."""
    return {str(n.outputs[0].name).removesuffix(".codes"): n for n in operators(model, "QuantizeLinear")}


def error(before: Sequence[Array], after: Sequence[Array]) -> float:
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for b, a in zip(before, after, strict=True))


# --------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", ["w8a8_static", "w4a16_g32", "float"])
def test_experts_stay_float_and_say_so(recipe: str) -> None:
    with bench(cached_export("mixtral")) as found:
        left = Draft(found.model, load(recipe), found.ctx.workspace).left
    why = "the recipe keeps it float" if recipe == "float" else "its matrices are experts chosen for each token"
    for layer in (0, 1):  # gate with up, and down
        products = [item for item in left if item[0] == f"model.layers.{layer}.mlp.experts"]
        assert len({node for _, _, node in products}) == 2 and all(why in reason for _, reason, _ in products)


MODELS = ("bert", "gpt2", "llama", "mixtral", "t5", "vit")
# Of random models, which double an error in every layer; one that is wrong altogether is at 1.4.
LOSS = {"w8a8_static": 0.7, "w8a8": 0.4, "w4a16_g32": 0.9}


@pytest.mark.parametrize(("name", "recipe"), list(itertools.product(MODELS, LOSS)))
def test_every_linear_has_the_codes_of_its_scheme_and_a_line_in_the_ledger(name: str, recipe: str) -> None:
    with quantised(cached_export(name), recipe) as (found, entry, before):
        scheme = found.ctx.recipe.rule("linear", "any")
        assert scheme is not None and scheme.weights is not None
        low, high = code_range(scheme.weights.bits, scheme.weights.symmetric, signed=True)
        codes = {layer: held(node, 0) for layer, node in weights_of(found.model).items()}
        assert {site["site"] for site in entry.sites} <= set(codes) and len(entry.sites) >= 7
        for site in entry.sites:
            if site["weights"] == str(scheme.weights):
                found_codes = codes[site["site"]]
                assert found_codes.dtype == np.int8 and low <= found_codes.min() and found_codes.max() <= high
            assert site["weight_sqnr_db"] > (30 if scheme.weights.bits == 8 else 12)
        assert entry.rewrites >= len(entry.sites) and entry.preserves == "approximation"
        assert not [linear for linear in find_linears(found.model.graph) if not linear.is_head]
        assert 0 < error(before, found.outputs()) < LOSS[recipe]


@pytest.mark.parametrize("name", ("bert", "llama", "t5"))
def test_no_mask_and_no_constant_is_calibrated(name: str) -> None:
    """Elsewhere the mask's -3.4e38 becomes an activation of scale 1.3e36, and attention turns uniform."""
    recipe = Recipe(
        name="all",
        rules=(
            Rule(weights=WeightScheme(bits=8), activations=ActivationScheme(bits=8)),
            Rule(op="attention", activations=ActivationScheme(bits=8)),
        ),
    )
    with quantised(cached_export(name), recipe) as (found, _, _):
        quantisers = activations_of(found.model)
        assert len(quantisers) > 10
        for value, node in quantisers.items():
            assert constant_array(node.inputs[0]) is None, value
            assert 0 < held(node, 1).max() < 100, value
            assert held(node, 2).dtype == np.uint8, "int8 activations are slow, or do not load"
        assert "mask" not in " ".join(quantisers)


@pytest.mark.parametrize("recipe", ("w8a8", "w6a6", "w4a4"))
def test_dynamic_recipes_hold_no_range_and_need_no_sample_for_one(recipe: str) -> None:
    with quantised(cached_export("llama"), recipe, energy=0) as (found, entry, _):
        assert not activations_of(found.model)
        assert operators(found.model, "FakeQuantizePerToken")
        assert "alpha_search" not in entry.facts


def test_weight_only_recipes_leave_activations_alone() -> None:
    with quantised(cached_export("bert"), "w4a16_g32") as (found, entry, _):
        assert not activations_of(found.model) and not operators(found.model, "FakeQuantizePerToken")
        assert {site["activations"] for site in entry.sites} == {"float"}


def test_a_group_that_does_not_divide_the_channels_is_quantised_all_the_same() -> None:
    """128 inputs in groups of 48: other tools stop here."""
    with quantised(cached_export("bert"), load("w4a16_g48")) as (found, _, before):
        node = weights_of(found.model)["encoder.layer.0.output.dense"]
        assert held(node, 0).shape == (128, 64) and held(node, 1).shape == (3, 64)
        assert error(before, found.outputs()) < 0.5


@pytest.mark.parametrize("recipe", ("w8a8_static", "w8a8", "w4a16_g32"))
def test_the_floats_are_not_kept_beside_the_codes(recipe: str) -> None:
    """Files of other tools end up larger than the float model."""
    with quantised(cached_export("llama"), recipe) as (found, _, _):
        floats = [v for v in found.model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
        shapes = [tuple(v.shape.numpy()) for v in floats if v.shape is not None]
        assert not {(64, 64), (64, 32), (64, 128), (128, 64)} & set(shapes)
        assert [node for node in found.model.graph if node.op_type == "MatMul"]


def test_static_ranges_need_calibration() -> None:
    with bench(normed(*outlier_norm()), inputs()) as found:
        found.ctx.samples = []
        with pytest.raises(UserError, match="no calibration sample reaches 'normed'"):
            found.run("quantise")


def test_nan_in_an_activation_is_named() -> None:
    samples = inputs()
    samples[2].feeds["x"][0, 1, 0] = np.nan
    with bench(normed(*outlier_norm()), samples) as found, pytest.raises(UserError, match="'normed' holds NaN"):
        found.run("quantise")


def test_a_graph_without_linears_is_left_with_a_note() -> None:
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[b, s, 8] x) => (float[b, s, 8] y) { y = Neg (x) }'
    model = ir.from_proto(onnx.parser.parse_model(text))
    with quantised(model, "w8a8_static", inputs(channels=8)) as (_, entry, _):
        assert entry.rewrites == 0 and "nothing to quantise" in entry.notes[0]


def test_the_same_twice() -> None:
    written = []
    for _ in range(2):
        with quantised(cached_export("bert"), "w4a4_static") as (found, _, _):
            written.append(ir.to_proto(found.model).SerializeToString(deterministic=True))
    assert written[0] == written[1]


# --------------------------------------------------------------------------- head and embeddings


def tied(vocabulary: int = 1100, width: int = 64) -> ir.Model:
    """input_ids -> embedding -> Neg -> Transpose(embedding): a language model without layers."""
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (int64[b, s] input_ids) => (float[b, s, {vocabulary}] logits) {{
        x = Gather (wte, input_ids)
        h = Neg (x)
        t = Transpose <perm = [1, 0]> (wte)
        logits = MatMul (h, t)
    }}"""
    proto = onnx.parser.parse_model(text)
    table = np.random.default_rng(0).standard_normal((vocabulary, width)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "wte"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


IDS = [Sample({"input_ids": np.arange(40).reshape(1, 40) * 27})]


@pytest.mark.parametrize("recipe", ("w8a8_static", "w4a16_g32"))
def test_a_tied_head_and_its_embedding_are_one_table_of_codes(recipe: str) -> None:
    with quantised(tied(), recipe, IDS) as (found, entry, before):
        (table,) = operators(found.model, "DequantizeLinear")
        assert held(table, 0).shape == (1100, 64) and held(table, 1).shape == (1100,)
        assert {user.op_type for user, _ in table.outputs[0].uses()} == {"Gather", "Transpose"}
        assert bool(operators(found.model, "FakeQuantizePerToken")) == (recipe == "w8a8_static")
        assert "wte" not in found.model.graph.initializers and entry.rewrites == 1
        assert error(before, found.outputs()) < 0.02


def test_what_the_recipe_leaves_float_is_said_with_the_reason() -> None:
    recipe = Recipe(name="mine", rules=(Rule(scope="*.0.*", weights=WeightScheme(bits=8)),))
    with quantised(cached_export("gpt2"), recipe) as (found, entry, _):
        reasons = {skip.site: skip.reason for skip in entry.skips}
        assert reasons["transformer.h.1.mlp.c_fc"] == reasons["lm_head"] == "the recipe keeps it float"
        assert "transformer.h.0.mlp.c_fc" in weights_of(found.model)
        assert all(skip.node for skip in entry.skips)


def test_a_small_table_stays_float_and_says_so() -> None:
    with quantised(cached_export("gpt2"), "w8a8_static") as (_, entry, _):
        assert any("too small to matter" in skip.reason for skip in entry.skips)


# --------------------------------------------------------------------------- mixed precision


MIXED = """
base = "w8a8_static"
[[rule]]
scope = "*.1.*"
weights = { bits = 4, granularity = "group", group_size = 16 }
activations = { bits = 8, granularity = "per_token" }
[[rule]]
scope = "*.0.*.query"
[[rule]]
scope = "*.0.output.dense"
weights = { bits = 4 }
"""


def test_rules_by_glob_give_each_site_its_own_scheme(tmp_path: Path) -> None:
    (tmp_path / "mixed.toml").write_text(MIXED)
    with quantised(cached_export("bert"), str(tmp_path / "mixed.toml")) as (found, entry, before):
        sites = {site["site"]: site for site in entry.sites}
        assert sites["encoder.layer.1.output.dense"]["weights"].startswith("int4 g16")
        assert "per_token" in sites["encoder.layer.1.output.dense"]["activations"]
        assert sites["encoder.layer.0.attention.self.key"]["weights"].startswith("int8 per_channel")
        down = weights_of(found.model)["encoder.layer.0.output.dense"]
        assert np.abs(held(down, 0)).max() <= 7 and "block_size" not in down.attributes
        query = next(n for n in find_linears(found.model.graph) if n.name.endswith("0.attention.self.query"))
        key = weights_of(found.model)["encoder.layer.0.attention.self.key"]
        (product, _), *_ = key.outputs[0].uses()
        assert product.inputs[0] is not None and product.inputs[0].name == f"{query.x.name}.dequantized"
        assert error(before, found.outputs()) < 0.5


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ({"scope": "transformer.h.0.mlp.cfc"}, "no linear, so its rule does nothing; did you mean transformer.h."),
        ({"scope": "lm_head"}, 'did you mean op = "head"?'),
        ({"scope": "zzz", "op": "embedding"}, "scope 'zzz' matches no embedding, so its rule does nothing; known: "),
    ],
)
def test_a_scope_that_matches_nothing_is_told(rule: dict[str, Any], text: str, capsys: Any) -> None:
    rules = (Rule(scope="*.c_*", weights=WeightScheme(bits=8)), Rule.model_validate(rule))
    with quantised(cached_export("gpt2"), Recipe(name="mine", rules=rules)) as (_, entry, _):
        (note,) = entry.notes
        assert text in note and f"warning: {note}" in capsys.readouterr().err


def test_a_float_linear_beside_a_quantised_one_reads_floats() -> None:
    """Both read the same norm; only the one that the recipe names reads it quantised."""
    rule = Rule(scope="fc0", weights=WeightScheme(bits=8), activations=ActivationScheme(bits=2))
    recipe = Recipe(name="one", rules=(rule,))
    with quantised(normed(*outlier_norm(), readers=2), recipe, inputs()) as (found, _, before):
        after = found.outputs()
        changed = [not np.array_equal(a, b) for a, b in zip(after, before, strict=True)]
        assert changed == [True, False] * 3


def test_a_weight_only_linear_beside_a_static_one_reads_floats() -> None:
    rules = (
        Rule(scope="fc0", weights=WeightScheme(bits=8)),
        Rule(scope="fc1", weights=WeightScheme(bits=8), activations=ActivationScheme(bits=2)),
    )
    with quantised(normed(*outlier_norm(), readers=2), Recipe(name="two", rules=rules), inputs()) as (found, _, before):
        after = found.outputs()
        assert error(before[::2], after[::2]) < 0.02 < 0.2 < error(before[1::2], after[1::2])


def test_siblings_that_disagree_are_recorded() -> None:
    rules = (
        Rule(scope="fc0", weights=WeightScheme(bits=8), activations=ActivationScheme(bits=8)),
        Rule(scope="fc1", weights=WeightScheme(bits=8), activations=ActivationScheme(bits=4)),
    )
    with quantised(normed(*outlier_norm(), readers=2), Recipe(name="two", rules=rules), inputs()) as (_, entry, _):
        (skip,) = entry.skips
        assert skip.site == "fc1" and "its input is read as uint8" in skip.reason


def test_two_linears_of_one_module_have_codes_of_their_own() -> None:
    """torch's MultiheadAttention calls two products in one module: the name alone does not tell them apart."""
    rng = np.random.default_rng(0)
    model = wide("Relu", rng.standard_normal((32, 24)), rng.standard_normal((24, 8)))
    remember(model)
    for node in operators(model, "MatMul"):
        node.metadata_props["qcompile.layer"] = "encoder.attn"
    model.graph.outputs.append(operators(model, "MatMul")[0].outputs[0])
    recipe = Recipe(name="w8", rules=tuple(Rule(op=op, weights=WeightScheme(bits=8)) for op in ("linear", "head")))
    with quantised(model, recipe, inputs()) as (found, entry, before):
        assert [site["site"] for site in entry.sites] == ["encoder.attn", "encoder.attn#2"]
        assert error(before, found.outputs()) < 0.02


# --------------------------------------------------------------------------- other activations


@pytest.mark.parametrize("observer", ("minmax", "avg_minmax", "percentile", "mse", "token_wise"))
def test_every_observer_quantises_a_model(observer: str) -> None:
    scheme = ActivationScheme.model_validate({"bits": 8, "observer": observer})
    recipe = Recipe(name=observer, rules=(Rule(weights=WeightScheme(bits=8), activations=scheme),))
    with quantised(cached_export("bert"), recipe) as (found, _, before):
        assert error(before, found.outputs()) < 0.35


def test_channel_groups_beat_one_range_where_channels_differ() -> None:
    errors = {}
    for granularity in ("per_tensor", "channel_group"):
        scheme = ActivationScheme.model_validate({"bits": 4, "granularity": granularity, "observer": "minmax"})
        recipe = Recipe(name="peg", rules=(Rule(weights=WeightScheme(bits=8), activations=scheme),))
        with quantised(normed(*outlier_norm()), recipe, inputs()) as (found, _, before):
            errors[granularity] = error(before, found.outputs())
            (node,) = activations_of(found.model).values()
            assert np.unique(held(node, 1)).size == (6 if granularity == "channel_group" else 1)
    assert errors["channel_group"] < 0.75 * errors["per_tensor"], errors


def two_outliers() -> tuple[Array, Array]:
    gamma = np.ones(32)
    gamma[[5, 9]] = 300
    return gamma, np.zeros(32)


@pytest.mark.parametrize("granularity", ("per_tensor", "per_token"))
@pytest.mark.parametrize("alpha", ("none", "1.0"))
def test_outlier_columns_in_float_leave_the_rest_its_bits(granularity: str, alpha: str) -> None:
    errors = {}
    for threshold in (None, 50.0):
        scheme = ActivationScheme.model_validate(
            {"bits": 8, "granularity": granularity, "outlier_threshold": threshold, "observer": "minmax"}
        )
        recipe = Recipe(name="llm_int8", rules=(Rule(weights=WeightScheme(bits=8), activations=scheme),))
        with quantised(normed(*two_outliers()), recipe, inputs(), alpha=alpha) as (found, _, before):
            errors[threshold] = error(before, found.outputs())
            gathers = [held(node, 1).tolist() for node in operators(found.model, "Gather")]
            assert gathers == ([[5, 9]] if threshold else [])
    assert errors[50.0] < 0.02 and errors[50.0] < 0.3 * errors[None], errors


def test_outlier_columns_are_exact_when_nothing_else_counts() -> None:
    """All columns over the threshold: the product is the float one."""
    scheme = ActivationScheme(bits=2, granularity="per_token", outlier_threshold=1e-6)
    recipe = Recipe(name="all", rules=(Rule(weights=WeightScheme(bits=2), activations=scheme),))
    with quantised(normed(*outlier_norm()), recipe, inputs()) as (found, _, before):
        assert error(before, found.outputs()) < 1e-6


def test_quantised_attention_by_rule() -> None:
    recipe = Recipe(
        name="attention",
        rules=(
            Rule(weights=WeightScheme(bits=8), activations=ActivationScheme(bits=8)),
            Rule(op="attention", activations=ActivationScheme(bits=8)),
        ),
    )
    with quantised(cached_export("llama"), recipe) as (found, _, before):
        assert not operators(found.model, "GroupedAttention") and len(operators(found.model, "Softmax")) == 2
        assert error(before, found.outputs()) < 0.4


# --------------------------------------------------------------------------- the clip


def test_the_clip_is_chosen_on_the_output_and_its_curve_is_kept() -> None:
    with quantised(cached_export("bert"), "w4a4_static") as (_, entry, _):
        curve = dict(entry.facts["alpha_search"])
        assert entry.facts["alpha"] == min(curve, key=lambda alpha: curve[alpha]) and 1.0 in curve


def test_a_given_clip_is_taken() -> None:
    with quantised(cached_export("bert"), "w4a4_static", alpha=0.5) as (_, entry, _):
        assert entry.facts["alpha"] == 0.5 and "alpha_search" not in entry.facts


def test_a_draft_leaves_the_float_model_as_it_was() -> None:
    with bench(cached_export("bert")) as found:
        text = str(found.model)
        found.ctx.recipe = load("w8a16")
        draft = Draft(found.model, found.ctx.recipe, found.ctx.workspace)
        assert len(weights_of(draft.build())) == 12 and str(found.model) == text
        assert not weights_of(found.model) and find_embeddings(found.model.graph)


# --------------------------------------------------------------------------- what each half costs


def test_the_effects_of_weights_and_activations_are_told_apart() -> None:
    """Whoever chose the codes before, rounded activations alone meet the float weights."""
    found = {}
    for passes in ("", "rtn", "token_clip{reach=0.7}"):
        with qcompile.compile(cached_export("gpt2"), recipe="w3a5", passes=passes) as compiled:
            found[passes] = compiled.manifest["passes"][-2]["facts"]["effects"]
    plain, solved = found[""], found["rtn"]
    assert plain["measure"].startswith("KL")
    assert solved["activations"] == plain["activations"] > 0
    assert solved["weights"] > plain["activations"] and plain["both"] > plain["activations"]
    cut = found["token_clip{reach=0.7}"]
    assert cut["activations"] > plain["activations"]
    assert cut["weights"] == pytest.approx(plain["weights"], rel=0.2), "their clips are for what is cut"
    with qcompile.compile(cached_export("gpt2"), recipe="w4a16", passes="") as compiled:
        assert "effects" not in compiled.manifest["passes"][-2]["facts"]
