"""The one file that rounds: exhaustive on int8, held to ONNX's operators and to the project's functions."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from qcompile.calibration.runner import open_session
from qcompile.errors import UserError
from qcompile.graph.functions import DOMAIN, use
from qcompile.quant.numerics import (
    Affine,
    QuantizedWeight,
    affine_from_range,
    code_range,
    dequantize,
    fake_quantize,
    fake_quantize_per_token,
    fake_quantize_weight,
    quantize,
    quantize_weight,
)
from qcompile.quant.schemes import WeightScheme

Array = np.ndarray
BITS = (2, 3, 4, 6, 8)
FEW = settings(max_examples=60, deadline=None, derandomize=True)
VALUES = st.floats(-1e4, 1e4, width=32)
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 24)), elements=VALUES)


def weight(k: int, n: int, seed: int = 0) -> Array:
    """Heavy-tailed columns of different size, so that a clip and a group have something to gain."""
    drawn = np.random.default_rng(seed).standard_t(3, (k, n)) * np.geomspace(0.01, 10, n)
    return drawn.astype(np.float32)


def by_energy(w: Array, scheme: WeightScheme, energy: Array | None) -> Array:
    """The squared error of each column, rows weighted by ``energy``."""
    error = np.square(quantize_weight(w, scheme, energy).dequantized() - w, dtype=np.float64)
    return np.asarray((error if energy is None else error * energy[:, None]).sum(axis=0))


# --------------------------------------------------------------------------- codes


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_codes_are_restricted_and_asymmetric_ones_use_all(bits: int) -> None:
    half = 2 ** (bits - 1)
    assert code_range(bits, symmetric=True, signed=True) == (-(half - 1), half - 1)
    assert code_range(bits, symmetric=True, signed=False) == (1, 2 * half - 1)
    assert code_range(bits, symmetric=False, signed=True) == (-half, half - 1)
    assert code_range(bits, symmetric=False, signed=False) == (0, 2 * half - 1)


@pytest.mark.parametrize("zero", (-128, -7, 0, 127))
def test_every_int8_code_survives_the_round_trip(zero: int) -> None:
    codes = np.arange(-128, 128)
    affine = Affine(np.float32(0.037), np.int32(zero), -128, 127)  # type: ignore[arg-type]
    assert (quantize(dequantize(codes, affine), affine) == codes).all()


@pytest.mark.parametrize("zero", (0, 3, 128, 255))
def test_halves_go_to_even_and_what_is_outside_saturates(zero: int) -> None:
    affine = Affine(np.array(0.5, np.float32), np.array(zero, np.int32), 0, 255)
    steps = np.arange(-600, 600) / 2  # every half step, exactly representable
    codes = quantize((steps * 0.5).astype(np.float32), affine)
    expected = [min(max(round(step) + zero, 0), 255) for step in steps]  # Python rounds half to even
    assert codes.tolist() == expected


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("signed", (True, False))
@FEW
@given(lo=VALUES, hi=VALUES, bits=st.sampled_from(BITS))
def test_ranges_cover_what_they_are_given_and_zero_is_exact(
    symmetric: bool, signed: bool, lo: float, hi: float, bits: int
) -> None:
    lo, hi = min(lo, hi), max(lo, hi)
    affine = affine_from_range(lo, hi, bits, symmetric, signed)
    assert affine.low <= affine.zero_point <= affine.high
    assert dequantize(quantize(np.zeros(1, np.float32), affine), affine) == 0
    step = float(affine.scale)
    ends = np.array([(affine.low - affine.zero_point) * step, (affine.high - affine.zero_point) * step])
    slack = 0.501 * step  # the zero point is rounded: one end may lose half a step
    assert ends[0] <= min(lo, 0) + slack and ends[1] >= max(hi, 0) - slack
    if symmetric:
        assert ends[0] == -ends[1]


@FEW
@given(x=ROWS, bits=st.sampled_from(BITS), symmetric=st.booleans(), signed=st.booleans())
def test_values_inside_the_range_move_by_half_a_step(
    x: Array, bits: int, symmetric: bool, signed: bool
) -> None:
    affine = affine_from_range(x.min(), x.max(), bits, symmetric, signed)
    codes = quantize(x, affine)
    assert affine.low <= codes.min() and codes.max() <= affine.high
    y = fake_quantize(x, affine)
    np.testing.assert_array_equal(y, dequantize(codes, affine))
    # half a step, and another half where rounding the zero point cut an end; float32 rounding on top
    assert np.abs(y - x).max() <= 1.001 * float(affine.scale) + 1e-6 * np.abs(x).max()


@FEW
@given(x=ROWS, bits=st.sampled_from(BITS), symmetric=st.booleans())
def test_a_second_quantisation_changes_nothing(x: Array, bits: int, symmetric: bool) -> None:
    affine = affine_from_range(x.min(), x.max(), bits, symmetric, signed=False)
    once = fake_quantize(x, affine)
    np.testing.assert_array_equal(fake_quantize(once, affine), once)


def test_a_range_of_nothing_is_finite() -> None:
    affine = affine_from_range(0.0, 0.0, 8, symmetric=False, signed=False)
    assert np.isfinite(affine.scale) and affine.scale > 0
    assert (fake_quantize(np.array([0.0, 3e38, -3e38], np.float32), affine)[:1] == 0).all()


@FEW
@given(x=ROWS, bits=st.sampled_from(BITS), symmetric=st.booleans())
def test_each_row_has_its_own_range(x: Array, bits: int, symmetric: bool) -> None:
    together = fake_quantize_per_token(x, bits, symmetric)
    alone = np.stack([fake_quantize_per_token(row[None], bits, symmetric)[0] for row in x])
    np.testing.assert_array_equal(together, alone)
    spread = np.maximum(x.max(axis=1), 0) - np.minimum(x.min(axis=1), 0)
    steps = 2**bits - 1 if not symmetric else 2 ** (bits - 1) - 1
    bound = (np.abs(x).max(axis=1) if symmetric else spread) / steps
    assert (np.abs(together - x).max(axis=1) <= 1.001 * bound + 1e-30).all()


# --------------------------------------------------------------------------- against ONNX


@functools.cache
def onnx_pair(per_channel: bool) -> Any:
    """QuantizeLinear, DequantizeLinear in ONNX Runtime: (x, scale, zero_point) -> (codes, values)."""
    size: list[str | int] = ["c"] if per_channel else []
    value = helper.make_tensor_value_info
    ends = [
        value("x", TensorProto.FLOAT, ["n", "c"]),
        value("s", TensorProto.FLOAT, size),
        value("z", TensorProto.UINT8, size),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["codes"], axis=1),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["y"], axis=1),
    ]
    results = [value("codes", TensorProto.UINT8, ["n", "c"]), value("y", TensorProto.FLOAT, ["n", "c"])]
    return session(helper.make_graph(nodes, "pair", ends, results))


def session(graph: onnx.GraphProto) -> Any:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return open_session(model.SerializeToString(), threads=1, literal_qdq=True)


@pytest.mark.parametrize("per_channel", (False, True))
@FEW
@given(x=ROWS, data=st.data())
def test_codes_and_values_are_those_of_onnx(per_channel: bool, x: Array, data: st.DataObject) -> None:
    shape = x.shape[1:] if per_channel else ()
    lo = data.draw(hnp.arrays(np.float32, shape, elements=VALUES))
    hi = data.draw(hnp.arrays(np.float32, shape, elements=VALUES))
    affine = affine_from_range(np.minimum(lo, hi), np.maximum(lo, hi), 8, symmetric=False, signed=False)
    feeds = {"x": x, "s": affine.scale, "z": affine.zero_point.astype(np.uint8)}
    codes, y = onnx_pair(per_channel).run(None, feeds)
    np.testing.assert_array_equal(quantize(x, affine), codes)
    np.testing.assert_array_equal(fake_quantize(x, affine), y)


@functools.cache
def per_token_function(name: str, levels: int) -> Any:
    """The project's function ``name`` in ONNX Runtime: x -> y."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", "c"]))
    node = ir.Node(DOMAIN, name, [x], [ir.AttrFloat32("levels", float(levels))], num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21}, name="function")
    model = ir.Model(graph, ir_version=10)
    use(model, name)
    return open_session(ir.to_proto(model).SerializeToString(), threads=1)


@pytest.mark.parametrize(("bits", "symmetric"), list(itertools.product((4, 6, 8), (True, False))))
def test_the_functions_compute_what_this_file_computes(bits: int, symmetric: bool) -> None:
    generator = np.random.default_rng(bits)
    x = (generator.standard_t(2, (256, 96)) * generator.uniform(1e-3, 1e3, (256, 1))).astype(np.float32)
    x[0], x[1], x[2] = 0, np.abs(x[1]), -np.abs(x[2])
    name = "FakeQuantizePerTokenSymmetric" if symmetric else "FakeQuantizePerToken"
    (y,) = per_token_function(name, 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1).run(None, {"x": x})
    expected = fake_quantize_per_token(x, bits, symmetric)
    step = (np.abs(x).max(axis=1, keepdims=True) * 2) / (2**bits - 2)
    assert (np.abs(y - expected) <= 1.001 * step).all()  # float32 and float64 scales part at exact halves
    assert (np.abs(y - expected) > 0.01 * step).mean() < 1e-3
    np.testing.assert_array_equal(y[0], 0)


# --------------------------------------------------------------------------- weights


SCHEMES = [
    WeightScheme.model_validate(
        {"bits": bits, "granularity": how, "group_size": group, "symmetric": symmetric, "clip": clip}
    )
    for bits, (how, group), symmetric, clip in itertools.product(
        (2, 4, 8),
        (("per_tensor", None), ("per_channel", None), ("group", 16)),
        (True, False),
        ("minmax", "mse"),
    )
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_of_weights_stay_within_their_bits(scheme: WeightScheme) -> None:
    w = weight(40, 12)
    made = quantize_weight(w, scheme)
    low, high = code_range(scheme.bits, scheme.symmetric, signed=True)
    assert made.codes.dtype == np.int8 and low <= made.codes.min() and made.codes.max() <= high
    assert made.scale.shape == ((3, 12) if scheme.group_size else (12,))
    assert made.zero_point.dtype == np.int8 and (not scheme.symmetric or not made.zero_point.any())
    if scheme.granularity == "per_tensor":
        assert np.unique(made.scale).size == 1
    np.testing.assert_array_equal(fake_quantize_weight(w, scheme), made.dequantized())
    if scheme.clip == "minmax":
        step = made.scale[np.arange(40) // 16] if scheme.group_size else made.scale
        assert (np.abs(made.dequantized() - w) <= 1.001 * step).all()


@pytest.mark.parametrize("k", (1, 16, 17, 40, 576))
@pytest.mark.parametrize("group", (16, 128))
def test_a_ragged_last_group_is_a_shorter_group(k: int, group: int) -> None:
    """Channel counts that a group does not divide (576 by 128) stop other tools; here it is just shorter."""
    w = weight(k, 5, seed=k)
    scheme = WeightScheme(bits=4, granularity="group", group_size=group, clip="mse")
    made = quantize_weight(w, scheme)
    pieces = [w[i : i + group] for i in range(0, k, group)]
    alone = WeightScheme(bits=4, clip="mse")
    expected = np.concatenate([quantize_weight(piece, alone).dequantized() for piece in pieces])
    np.testing.assert_array_equal(made.dequantized(), expected)
    assert made.codes.shape == w.shape and made.scale.shape == (len(pieces), 5)


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("group", (None, 16))
@pytest.mark.parametrize("energetic", (True, False))
def test_the_clip_is_never_worse_than_minmax_on_its_own_objective(
    symmetric: bool, group: int | None, energetic: bool
) -> None:
    how = "group" if group else "per_channel"
    better = 0
    for seed, bits in itertools.product(range(4), (2, 3, 4, 6)):
        w = weight(50, 16, seed)
        energy = np.random.default_rng(seed).gamma(0.3, 1, 50).astype(np.float32) if energetic else None
        base = {"bits": bits, "granularity": how, "group_size": group, "symmetric": symmetric}
        schemes = (WeightScheme.model_validate(base | {"clip": clip}) for clip in ("mse", "minmax"))
        clipped, minmax = (by_energy(w, scheme, energy) for scheme in schemes)
        assert (clipped <= minmax * (1 + 1e-5)).all()
        better += int((clipped < 0.99 * minmax).sum())
    assert better > 20


def test_energy_says_whose_error_counts() -> None:
    w = weight(64, 32)
    energy = np.full(64, 1e-3, np.float32)
    energy[:8] = 10
    scheme = WeightScheme(bits=3)
    informed, blind = quantize_weight(w, scheme, energy), quantize_weight(w, scheme)
    weighted = [(np.square(q.dequantized() - w) * energy[:, None]).sum() for q in (informed, blind)]
    assert weighted[0] < 0.95 * weighted[1]


def test_a_column_of_zeros_stays_zero() -> None:
    w = weight(32, 4)
    w[:, 2] = 0
    for scheme in SCHEMES:
        values = quantize_weight(w, scheme).dequantized()
        assert np.isfinite(values).all() and not values[:, 2].any()


def test_groups_are_what_onnx_dequantises_also_when_ragged() -> None:
    w = weight(576, 8)
    made = quantize_weight(w, WeightScheme(bits=4, granularity="group", group_size=128, symmetric=False))
    arrays = {"codes": made.codes, "scale": made.scale, "zero": made.zero_point}
    held = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    node = helper.make_node("DequantizeLinear", [*arrays], ["y"], axis=0, block_size=128)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [576, 8])
    (y,) = session(helper.make_graph([node], "blocks", [], [result], held)).run(None, {})
    np.testing.assert_array_equal(made.dequantized(), y)


def test_only_matrices_are_quantised() -> None:
    with pytest.raises(UserError, match="rank 3"):
        quantize_weight(np.zeros((2, 3, 4), np.float32), WeightScheme(bits=8))


def test_dequantised_is_the_definition() -> None:
    codes = np.array([[1, -2], [3, 4], [5, 6]], np.int8)
    scale, zero = np.array([[0.5, 1.0], [2.0, 0.25]], np.float32), np.array([[1, 0], [0, -8]], np.int8)
    values = QuantizedWeight(codes, scale, zero, 2).dequantized()
    np.testing.assert_array_equal(values, [[0.0, -2.0], [1.0, 4.0], [10.0, 3.5]])
