"""Bodies and kernels of the integer operators give, bit for bit, what ``quant/integer.py`` gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qcompile.backends.ort.native import build
from qcompile.calibration.library import LIBRARY
from qcompile.calibration.runner import open_session
from qcompile.errors import UserError
from qcompile.graph.functions import DOMAIN, use
from qcompile.graph.integer import BODIES
from qcompile.graph.integer.norms import newton_root
from qcompile.graph.integer.parts import LAST, wide_constants
from qcompile.quant import integer

Array = np.ndarray
_RESULTS = {"RescaleToUint8": ir.DataType.UINT8, **dict.fromkeys(("RescaleToInt8", "SplitBytes"), ir.DataType.INT8)}
SHAPES = ((1, 1), (3, 1, 64), (2, 5, 33), (1, 768), (2, 2, 7, 40))
INT64_BY_ELEMENT = {"IntegerRMSNorm", "IntegerLayerNorm"}  # their sums
GROUND: dict[str, Path | None] = {"library": None}
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of kernels."""
    try:
        build.find_compiler()
    except UserError as error:
        pytest.skip(error.message)
    folder = tmp_path_factory.mktemp("kernels")
    build.write_library(folder)
    return folder / LIBRARY


@pytest.fixture(params=("bodies", "kernels"), autouse=True)
def ground(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operators run on: the standard operators of their bodies, or the kernels in C."""
    library = request.getfixturevalue("built") if request.param == "kernels" else None
    monkeypatch.setitem(GROUND, "library", library)


@functools.cache
def program(
    name: str, kinds: tuple[tuple[str, int], ...], attributes: tuple[tuple[str, int], ...], library: Path | None
) -> Any:
    """A session of one node of ``name`` for inputs of these types and ranks."""
    ends = [
        ir.Value(
            name=f"x{i}",
            type=ir.TensorType(ir.DataType.from_numpy(np.dtype(kind))),
            shape=ir.Shape([f"d{i}_{j}" for j in range(rank)]),
        )
        for i, (kind, rank) in enumerate(kinds)
    ]
    count = {
        "QuantizePerTokenInteger": 4,
        "QuantizePerTokenIntegerSymmetric": 4,
        "IntegerSoftmax": 2,
        "SplitBytes": 2,
        "IntegerSoftmax16": 3,
    }
    held = [ir.AttrInt64(key, value) for key, value in attributes]
    node = ir.Node(DOMAIN, name, ends, held, num_outputs=count.get(name, 1))
    for i, value in enumerate(node.outputs):
        codes = name not in _RESULTS and count.get(name, 1) > 1 and i < (2 if name == "IntegerSoftmax16" else 1)
        kind = ir.DataType.UINT8 if codes else _RESULTS.get(name.removesuffix("Turned"), ir.DataType.INT32)
        value.name, value.type = f"y{i}", ir.TensorType(kind)
    model = ir.Model(ir.Graph(ends, node.outputs, nodes=[node], opset_imports={"": 21}, name="g"), ir_version=10)
    use(model, name)
    return open_session(ir.to_proto(model).SerializeToString(), threads=1, library=library)


def computed(name: str, *inputs: Any, **attributes: int) -> list[Array]:
    """What ONNX Runtime makes of one node of ``name``."""
    arrays = [np.asarray(x) for x in inputs]
    kinds = tuple((x.dtype.name, x.ndim) for x in arrays)
    session = program(name, kinds, tuple(attributes.items()), GROUND["library"])
    results: list[Array] = session.run(None, {f"x{i}": x for i, x in enumerate(arrays)})
    return results


def equal(found: Sequence[Array], expected: Sequence[Array]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)


def wide(shape: tuple[int, ...], bound: int, seed: int = 0) -> Array:
    """Rows of every size up to ``bound``: ordinary, all equal, zero, with one outlier, at both extremes."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(shape) * 2.0 ** generator.uniform(0, np.log2(bound) - 2, (*shape[:-1], 1))
    rows = np.clip(np.rint(x), -bound, bound).astype(np.int32).reshape(-1, shape[-1])
    special = [0, bound, -bound, 1, -1]
    for row, value in zip(rows[::2], special, strict=False):
        row[:] = value
    rows[-1, 0] = bound
    rows[-1, -1] = -bound
    return rows.reshape(shape)


@pytest.mark.parametrize("name", BODIES)
def test_a_body_has_no_float_and_no_slow_operator(name: str) -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
    use(model, name)
    for function in model.functions.values():
        for node in function:
            assert node.op_type not in {"Mod", "BitShift", "Clip", "Pow", "Sqrt"}
            for attribute in node.attributes.values():
                assert attribute.type not in {ir.AttributeType.FLOAT, ir.AttributeType.FLOATS}
                if attribute.type == ir.AttributeType.TENSOR:
                    assert attribute.as_tensor().dtype not in FLOATS
                if node.op_type == "Cast":
                    assert attribute.as_int() in {2, 3, 6, 7}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ("scalar", "column", "row", "element"))
def test_requantize(shape: tuple[int, ...], how: str) -> None:
    generator = np.random.default_rng(len(shape))
    x = wide(shape, 2**30 - 1)
    size = {"scalar": (), "column": shape[-1:], "row": (*shape[:-1], 1), "element": shape}[how]
    m = generator.integers(-(2**15) + 1, 2**15, size).astype(np.int32)
    d = (2 ** generator.integers(0, 30, () if how == "column" else size)).astype(np.int32)
    for low, high in ((-(2**30), 2**30), (-128, 127), (0, 255)):
        expected = integer.requantize(x, m, d, low, high)
        equal(computed("RequantizeSigned", x, m, d, low=low, high=high), [expected])
        equal(computed("Requantize", x, abs(m), d, low=low, high=high), [integer.requantize(x, abs(m), d, low, high)])


def test_requantize_at_every_corner() -> None:
    edges = [0, 1, 2, 2**15, 2**16 - 1, 2**16, 2**16 + 1, 3 * 2**15, 2**29, 2**30 - 2**16, 2**30 - 1]
    x = np.array([*edges, *(-e for e in edges)], np.int32)[:, None, None]
    m = np.array([0, 1, 2**14, 2**15 - 2, 2**15 - 1, -1, -(2**15) + 1], np.int32)[:, None]
    d = (2 ** np.arange(30)).astype(np.int32)
    ends = {"low": -(2**30), "high": 2**30}
    equal(computed("RequantizeSigned", x, m, d, **ends), [integer.requantize(x, m, d, *ends.values())])


@pytest.mark.parametrize("shape", (*SHAPES, (2, 3, 70, 32), (1, 5000)))
def test_rescale(shape: tuple[int, ...]) -> None:
    """Every operand broadcasts in every way, and what is added may be larger than x."""
    generator = np.random.default_rng(len(shape))
    ways = [(), shape[-1:], (*shape[:-1], 1), shape, tuple(n if i % 2 else 1 for i, n in enumerate(shape))]
    for number in range(12):
        sizes = [ways[generator.integers(0, len(ways))] for _ in range(5)]
        x = wide(shape if number % 3 else (1, *shape[1:]), 2**29 - 1, seed=number)
        before, after = (generator.integers(-(2**20), 2**20, s).astype(np.int32) for s in (sizes[0], sizes[3]))
        m = generator.integers(-(2**15) + 1, 2**15, sizes[1]).astype(np.int32)
        d = (2 ** generator.integers(0, 30, sizes[2])).astype(np.int32)
        lift = (2 ** generator.integers(0, 4, sizes[4])).astype(np.int32)
        inside = (-(2**30), 2**30) if number % 2 else (-(2**12), 2**11)
        for name, kind, outside in (
            ("Rescale", np.int32, (-(2**31), 2**31 - 1)), ("Rescale", np.int32, (-1000, 2**28)),
            ("RescaleToUint8", np.uint8, (0, 255)), ("RescaleToInt8", np.int8, (-127, 127)),
        ):  # fmt: skip
            between = (-(2**28), 2**28) if number % 4 else (-5, 100)
            expected = integer.rescale(x, before, lift, m, d, after, inside, between, outside)
            names = ("floor", "ceiling", "low", "high", "least", "most")
            ends = dict(zip(names, (*inside, *between, *outside), strict=True))
            equal(computed(name, x, before, lift, m, d, after, **ends), [expected.astype(kind)])
            if x.ndim == 4:
                turned = np.ascontiguousarray(x.transpose(0, 2, 1, 3))
                found = computed(f"{name}Turned", turned, before, lift, m, d, after, **ends)
                equal(found, [expected.astype(kind)])


def test_split_bytes() -> None:
    x = np.arange(-127 * 256, 127 * 256 + 1, dtype=np.int32).reshape(1, -1)
    high, low = integer.split_bytes(x)
    np.testing.assert_array_equal(high.astype(np.int32) * 256 + low, x)
    equal(computed("SplitBytes", x), [high, low])


@pytest.mark.parametrize("bits", (2, 4, 6, 8))
@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_per_token(shape: tuple[int, ...], symmetric: bool, bits: int) -> None:
    x = wide(shape, 2**29 - 1)
    name = "QuantizePerTokenInteger" + "Symmetric" * symmetric
    for rows in (x, np.abs(x), -np.abs(x), np.clip(x, -1, 2)):
        equal(computed(name, rows, bits=bits), integer.quantize_per_token(rows, bits, symmetric))


@pytest.mark.parametrize("epsilon", (0, 1, 2**20, 2**29 - 1))
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape: tuple[int, ...], epsilon: int) -> None:
    x = wide(shape, 2**29)
    equal(computed("IntegerRMSNorm", x, epsilon=epsilon), [integer.rms_norm(x, epsilon)])
    x = wide(shape, 2**28, seed=1)
    equal(computed("IntegerLayerNorm", x, epsilon=epsilon), [integer.layer_norm(x, epsilon)])


def test_the_root_is_exact_wherever_it_changes() -> None:
    """Beside every square: the smallest roots, powers of two, the marks of the starts, and many between."""
    generator = np.random.default_rng(5)
    drawn = 2 ** np.concatenate([generator.uniform(14, 24, 200_000), np.arange(14, 24, 0.25)])
    roots = np.concatenate([2**14 + np.arange(5000), 2**24 - 1 - np.arange(5000), np.rint(drawn).astype(np.int64)])
    v = np.clip(np.concatenate([roots**2 + step for step in (-1, 0, 1)]), 2**28, 2**48 - 1)[:, None]
    text = f"""<domain: "{DOMAIN}", opset_import: ["" : 21]> Root (v) => (root) {{
        {LAST}{wide_constants(two64=2, root_low=2**14, root_high=2**24 - 1)}{newton_root()}
    }}"""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21, "{DOMAIN}" : 1]> '
        f"g (int64[n, 1] v) => (int64[n, 1] root) {{ root = {DOMAIN}.Root (v) }}"
    )
    model.functions.append(onnx.parser.parse_function(text))
    (root,) = open_session(model.SerializeToString(), threads=1).run(None, {"v": v})
    np.testing.assert_array_equal(root[:, 0], [math.isqrt(x) for x in v[:, 0].tolist()])
    np.testing.assert_array_equal(integer.isqrt(v), root)


@pytest.mark.parametrize("bound", (2**12, 2**20, 2**29))
@pytest.mark.parametrize("lift", (1, 16, 2**12))
def test_softmax(bound: int, lift: int) -> None:
    scores = wide((2, 3, 9, 50), bound)
    masks = [np.ones((1, 1, 1, 50), bool), np.tril(np.ones((9, 50), bool))[None, None], np.zeros((2, 1, 9, 50), bool)]
    masks[2][0, 0, 4, 7] = True
    periods = np.random.default_rng(0).integers(2**13, 2**16, (2, 3, 9, 1)).astype(np.int32)
    for mask in masks:
        for period in (periods, np.array(2**13, np.int32), np.array(2**16 - 1, np.int32)):
            weights, total = integer.softmax_weights(scores, mask, period, lift, 8)
            equal(computed("IntegerSoftmax", scores, mask, period, lift=lift), [weights.astype(np.uint8), total])
            weights, total = integer.softmax_weights(scores, mask, period, lift, 16)
            bytes_ = [(weights // 256).astype(np.uint8), (weights % 256).astype(np.uint8)]
            equal(computed("IntegerSoftmax16", scores, mask, period, lift=lift), [*bytes_, total])


def test_attention_is_normalised() -> None:
    generator = np.random.default_rng(2)
    total = np.concatenate([[1, 2, 255, 256, 255 * 32768], generator.integers(1, 255 * 32768, 200)])
    total = total.astype(np.int32).reshape(1, 1, -1, 1)
    share = np.concatenate([[-128, 128, 0], generator.uniform(-128, 128, 61)])
    sums = np.clip(np.rint(total * share), -128.0 * total, 128.0 * total).astype(np.int32)
    equal(computed("NormalizeAttention", sums, total), [integer.normalize_attention(sums, total)])
    total = np.concatenate([[1, 65535, 65535 * 32768], generator.integers(65535, 65535 * 32768, 200)])
    total = total.astype(np.int32).reshape(1, 1, -1, 1)
    for lift in (1, 16):
        high, low = (generator.integers(-(2**30) + 1, 2**30, (1, 2, 203, 64)) // lift for _ in range(2))
        inputs = high.astype(np.int32), low.astype(np.int32), total
        equal(computed("NormalizeAttention16", *inputs, lift=lift), [integer.normalize_attention16(*inputs, lift)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit", (2**11, 2**16, 2**25))
def test_activations(shape: tuple[int, ...], unit: int) -> None:
    around = np.arange(-13 * 997, 13 * 997, 997)[: int(np.prod(shape))] / 997
    near = np.resize(np.rint(around * unit), shape).astype(np.int32)
    for x in (wide(shape, 2**29), near):
        equal(computed("IntegerSigmoid", x, unit=unit), [integer.sigmoid(x, unit)])
        equal(computed("IntegerTanh", x, unit=2 * unit), [integer.tanh(x, 2 * unit)])
        for name, table in (("IntegerSilu", "silu"), ("IntegerGelu", "gelu"), ("IntegerGeluTanh", "gelu_tanh")):
            equal(computed(name, x, unit=unit), [integer.activation(table, x, unit)])


@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: tuple[int, ...]) -> None:
    a, b = wide(shape, 2**30 - 1), wide(shape, 2**29, seed=1)
    for narrow, divisor in ((1, 1), (2**14, 2), (2**15, 2**20)):
        settings = {"narrow": narrow, "divisor": divisor, "low": -(2**28), "high": 2**28}
        equal(computed("MultiplyWide", a, b, **settings), [integer.multiply_wide(a, b, **settings)])
        settings = {"narrow": narrow, "divisor": divisor, "high": 2**28}
        equal(computed("IntegerRelu2", b, **settings), [integer.relu_squared(b, **settings)])
    settings = {"narrow": 2**14, "divisor": 2, "low": -(2**28), "high": 2**28}
    for few, many in ((a[..., :1], b), (a, b[..., :1]), (a[:1], b)):
        equal(computed("MultiplyWide", few, many, **settings), [integer.multiply_wide(few, many, **settings)])


@pytest.mark.parametrize("bound", (1, 300, 2**16 - 1))
def test_rotary_embedding(bound: int) -> None:
    x = wide((2, 3, 7, 16), bound) if bound > 8 else np.ones((2, 3, 7, 16), np.int32)
    angles = np.outer(np.arange(7), np.geomspace(1, 1e-4, 8))
    cos, sin = (np.tile(np.rint(f(angles) * 2**14), 2)[None, None].astype(np.int32) for f in (np.cos, np.sin))
    equal(computed("IntegerRotaryEmbedding", x, cos, sin), [integer.rotary_embedding(x, cos, sin)])
    full = np.full_like(cos, 2**14)
    equal(computed("IntegerRotaryEmbedding", x, full, -full), [integer.rotary_embedding(x, full, -full)])
