"""How quantisation is spelled in the graph, run by ONNX Runtime and held to the numerics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.calibration.runner import OrtRunner
from qcompile.calibration.samples import Sample
from qcompile.graph.functions import DOMAIN, use
from qcompile.graph.linears import find_embeddings, find_linears
from qcompile.graph.provenance import remember
from qcompile.graph.qdq import (
    keep_columns,
    quantize_attention,
    quantize_linear_weight,
    quantize_per_token,
    quantize_static,
    quantize_table,
)
from qcompile.graph.workspace import Workspace
from qcompile.models.architectures import cached_export
from qcompile.quant.numerics import (
    Affine,
    affine_from_range,
    dequantize,
    fake_quantize,
    fake_quantize_per_token,
    quantize,
    quantize_weight,
)
from qcompile.quant.schemes import ActivationScheme, WeightScheme
from tests.passes.planted import bench, wide

Array = np.ndarray
K, N = 48, 40
Feeds = dict[str, Array]


@pytest.fixture
def held(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def linear_model() -> ir.Model:
    """x [batch, seq, K] -> relu(x up) down, where relu only stands between two linears."""
    return remembered(wide("Relu", drawn(K, N, seed=1), drawn(N, 8, seed=2)))


def remembered(model: ir.Model) -> ir.Model:
    remember(model)
    return model


def run(model: ir.Model, held: Workspace, feeds: Feeds, *names: str) -> list[Array]:
    wanted = list(names) or [str(v.name) for v in model.graph.outputs]
    ((_, values),) = OrtRunner(held, threads=1).stream(model, [Sample(feeds)], wanted)
    onnx.checker.check_model(str(held.save(model, "checked")))
    return [np.array(values[name]) for name in wanted]


def value(model: ir.Model, name: str) -> ir.Value:
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    return next(v for v in values if v.name == name)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


# --------------------------------------------------------------------------- activations


@pytest.mark.parametrize("name", ("x", "active"))  # an input of the graph, and a value inside
@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("bits", (2, 4, 6, 8))
def test_static_activations_are_uint8_whatever_the_bits(held: Workspace, name: str, bits: int, symmetric: bool) -> None:
    """int8 activations are slow or do not load; fewer than 8 bits are a part of uint8 behind a Clip."""
    model = linear_model()
    affine = affine_from_range(-1.5, 1.0, bits, symmetric, signed=False)
    readers = [(linear.node, 0) for linear in find_linears(model.graph) if linear.x.name == name]
    quantize_static(model, value(model, name), readers, affine, held)
    feeds = {"x": 3 * drawn(2, 5, K)}
    before, codes, after = run(model, held, feeds, name, f"{name}.codes", f"{name}.dequantized")
    assert codes.dtype == np.uint8 and affine.low <= codes.min() and codes.max() <= affine.high
    np.testing.assert_array_equal(codes, quantize(before, affine))
    np.testing.assert_array_equal(after, fake_quantize(before, affine))
    assert ("Clip" in operators(model)) == (bits < 8 or symmetric)
    assert readers[0][0].inputs[0] is value(model, f"{name}.dequantized")


@pytest.mark.parametrize("bits", (4, 8))
def test_channel_groups_have_ranges_of_their_own(held: Workspace, bits: int) -> None:
    model, feeds = linear_model(), {"x": drawn(2, 5, K) * np.geomspace(0.1, 50, K, dtype=np.float32)}
    reach = np.abs(feeds["x"]).max(axis=(0, 1)) * 0.9  # some values are outside
    affine = affine_from_range(-reach, reach, bits, symmetric=False, signed=False)
    quantize_static(model, value(model, "x"), [(find_linears(model.graph)[0].node, 0)], affine, held, axis=2)
    (after,) = run(model, held, feeds, "x.dequantized")
    np.testing.assert_allclose(after, fake_quantize(feeds["x"], affine), rtol=1e-6)
    assert {"Max", "Min"} <= set(operators(model)) if bits < 8 else "Max" not in operators(model)


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("bits", (4, 8))
def test_per_token_is_the_function_of_the_project(held: Workspace, bits: int, symmetric: bool) -> None:
    model, feeds = linear_model(), {"x": drawn(2, 5, K)}
    scheme = ActivationScheme(bits=bits, granularity="per_token", symmetric=symmetric)
    quantize_per_token(model, value(model, "x"), [(find_linears(model.graph)[0].node, 0)], scheme, held)
    (after,) = run(model, held, feeds, "x.per_token")
    np.testing.assert_allclose(after, fake_quantize_per_token(feeds["x"], bits, symmetric), rtol=1e-5, atol=1e-6)


def test_channels_left_out_do_not_stretch_a_tokens_range(held: Workspace) -> None:
    model, x = linear_model(), drawn(2, 5, K)
    x[..., 7] = 1000
    ordinary = np.arange(K) != 7
    scheme = ActivationScheme(bits=8, granularity="per_token")
    readers = [(find_linears(model.graph)[0].node, 0)]
    quantize_per_token(model, value(model, "x"), readers, scheme, held, ordinary)
    (after,) = run(model, held, {"x": x}, "x.per_token")
    assert np.abs(after - x)[..., ordinary].max() < 0.03 and not after[..., 7].any()


def test_readers_that_are_not_named_read_floats(held: Workspace) -> None:
    model = linear_model()
    affine = affine_from_range(-1, 1, 8, symmetric=False, signed=False)
    quantize_static(model, value(model, "active"), [], affine, held)
    feeds = {"x": drawn(1, 3, K)}
    np.testing.assert_array_equal(run(model, held, feeds)[0], run(linear_model(), held, feeds)[0])


# --------------------------------------------------------------------------- weights


@pytest.mark.parametrize("group", (None, 16, 32))  # 48 rows: 32 leaves a shorter last group
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_a_weight_is_its_codes_and_the_floats_are_gone(held: Workspace, bits: int, group: int | None) -> None:
    model, feeds = linear_model(), {"x": drawn(2, 5, K)}
    first = find_linears(model.graph)[0]
    granularity = "group" if group else "per_channel"
    scheme = WeightScheme(bits=bits, granularity=granularity, group_size=group, symmetric=False)  # type: ignore[arg-type]
    codes = quantize_weight(first.w, scheme)
    quantize_linear_weight(model, first, codes, held)
    product, y = run(model, held, feeds, "before", "y")
    np.testing.assert_allclose(product, feeds["x"] @ codes.dequantized(), rtol=1e-4, atol=1e-4)
    assert y.shape == (2, 5, 8)
    floats = {n: v for n, v in model.graph.initializers.items() if v.dtype == ir.DataType.FLOAT}
    assert not [n for n, v in floats.items() if v.shape is not None and list(v.shape) == [K, N]]
    assert value(model, "up.dequantized_weight").producer() is not None


def test_a_weight_that_another_reads_stays(held: Workspace) -> None:
    model = linear_model()
    first, second = find_linears(model.graph)
    model.graph.outputs.append(first.weight)
    quantize_linear_weight(model, first, quantize_weight(first.w, WeightScheme(bits=8)), held)
    assert "up.weight" in model.graph.initializers
    quantize_linear_weight(model, second, quantize_weight(second.w, WeightScheme(bits=8)), held)
    assert "down.weight" not in model.graph.initializers


TIED = """<ir_version: 10, opset_import: ["" : 21]>
g (int64[b, s] ids) => (float[b, s, 300] logits) {
    x = Gather (table, ids)
    t = Transpose <perm = [1, 0]> (table)
    logits = MatMul (x, t)
}"""


def test_a_head_that_is_the_transposed_embedding_shares_one_set_of_codes(held: Workspace) -> None:
    """Other tools leave it float, or store the table twice, or crash."""
    table = drawn(300, 32)
    proto = onnx.parser.parse_model(TIED)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    model = remembered(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))
    (head,), (gather,) = find_linears(model.graph), find_embeddings(model.graph)
    assert head.transposed and head.is_head
    codes = quantize_weight(table.T, WeightScheme(bits=8))
    found = gather.inputs[0]
    assert found is not None
    quantize_table(model, found, codes, held)
    ids = np.array([[3, 299, 0]])
    (logits,) = run(model, held, {"ids": ids})
    rows = codes.dequantized().T
    np.testing.assert_allclose(logits, rows[ids] @ rows.T, rtol=1e-4, atol=1e-4)
    assert "table" not in model.graph.initializers
    assert sum(v.shape is not None and v.shape.numpy() == (300, 32) for v in model.graph.initializers.values()) == 1


# --------------------------------------------------------------------------- outlier columns


@pytest.mark.parametrize("columns", ([], [0], [3, 17, 40]))
def test_columns_kept_in_float_lose_nothing(held: Workspace, columns: list[int]) -> None:
    model, feeds = linear_model(), {"x": drawn(2, 5, K)}
    (exact,) = run(model, held, feeds)
    first = find_linears(model.graph)[0]
    index = np.array(columns, np.int64)
    zeroed = keep_columns(model, first, index, first.w, held)
    assert not zeroed[index].any() and (zeroed != first.w).any(axis=1).sum() == len(columns)
    if columns:
        replaced = held.tensor(zeroed, "up.weight")
        model.graph.initializers["up.weight"].const_value = replaced
    np.testing.assert_allclose(run(model, held, feeds)[0], exact, rtol=1e-4, atol=1e-5)


def test_a_sum_takes_the_name_of_the_product_also_at_the_output(held: Workspace) -> None:
    model, feeds = linear_model(), {"x": drawn(2, 5, K)}
    (exact,) = run(model, held, feeds)
    last = find_linears(model.graph)[1]
    keep_columns(model, last, np.array([1, 2]), last.w, held)
    assert [v.name for v in model.graph.outputs] == ["y"] and value(model, "y").name == "y"
    assert operators(model)[-1] == "Add"
    assert run(model, held, feeds, "y")[0].shape == exact.shape


# --------------------------------------------------------------------------- attention


def attention_model(groups: int) -> ir.Model:
    """q (B, 4, S, d), k and v (B, 4 / groups, S, d), bias (S, S) -> attention."""
    op = "GroupedAttention" if groups > 1 else "Attention"
    kv: list[int | str] = ["b", 4 // groups, "s", 8]
    shapes: dict[str, list[int | str]] = {"q": ["b", 4, "s", 8], "k": kv, "v": kv, "bias": ["s", "s"]}
    floats = ir.TensorType(ir.DataType.FLOAT)
    ends = [ir.Value(name=n, type=floats, shape=ir.Shape(shape)) for n, shape in shapes.items()]
    attributes: list[ir.Attr] = [ir.AttrFloat32("scale", 0.35)]
    attributes += [ir.AttrInt64("groups", groups)] if groups > 1 else []
    node = ir.Node(DOMAIN, op, ends, attributes, num_outputs=1)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", floats, ends[0].shape
    graph = ir.Graph(ends, node.outputs, nodes=[node], opset_imports={"": 21, DOMAIN: 1}, name="g")
    model = ir.Model(graph, ir_version=10)
    use(model, op)
    return remembered(model)


def attended(q: Array, k: Array, v: Array, bias: Array, unit: Affine) -> Array:
    scores = q @ k.transpose(0, 1, 3, 2) * np.float32(0.35) + bias
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(fake_quantize(p / p.sum(axis=-1, keepdims=True), unit) @ v)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("groups", (1, 2, 4))
def test_quantised_attention_is_attention_on_quantised_operands(held: Workspace, groups: int, bits: int) -> None:
    """The mask is added in float: quantised, its -3.4e38 would own the range."""
    model = attention_model(groups)
    feeds = {n: drawn(2, 4 if n == "q" else 4 // groups, 6, 8, seed=i) for i, n in enumerate("qkv")}
    bias = np.triu(np.full((6, 6), np.finfo(np.float32).min), 1)
    ranges = [affine_from_range(x.min(), x.max(), bits, symmetric=False, signed=False) for x in feeds.values()]
    quantize_attention(model, next(iter(model.graph)), ranges, held)
    (y,) = run(model, held, feeds | {"bias": bias})
    q, k, v = (fake_quantize(x, affine) for x, affine in zip(feeds.values(), ranges, strict=True))
    unit = Affine(np.array(1 / (2**bits - 1), np.float32), np.array(0), 0, 2**bits - 1)
    expected = attended(q, np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1), bias, unit)
    step = float(unit.scale) * np.abs(v).max()
    assert (np.abs(y - expected) > 1e-4).mean() < 0.01 and np.abs(y - expected).max() < 2 * step
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert operators(model).count("QuantizeLinear") == 4 and "Attention" not in operators(model)


@pytest.mark.parametrize("name", ("bert", "llama", "t5", "vit"))
def test_attention_of_real_graphs_is_written_out_and_runs(name: str) -> None:
    with bench(cached_export(name)) as found:
        before = found.outputs()
        nodes = [n for n in found.model.graph if n.op_type in ("Attention", "GroupedAttention")]
        wide_range = affine_from_range(-8.0, 8.0, 8, symmetric=False, signed=False)
        for node in nodes:
            quantize_attention(found.model, node, [wide_range] * 3, found.ctx.workspace)
        after = found.outputs()
        assert operators(found.model).count("QuantizeLinear") == 4 * len(nodes) > 0
        pairs = zip(before, after, strict=True)
        assert max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for b, a in pairs) < 0.6


def test_the_definition_of_codes_is_the_numerics() -> None:
    affine = Affine(np.float32(0.5), np.int32(3), 0, 15)  # type: ignore[arg-type]
    np.testing.assert_array_equal(dequantize(np.array([0, 3, 15]), affine), [-1.5, 0, 6])
