"""Products, norms, tables and joins: the integers beside the floats of the same quantised graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calibration.positions import position_limits
from qcompile.graph import functions
from qcompile.integer import rules
from qcompile.models.architectures import POSITIONS
from tests.integer.graphs import Outcome, converted, drawn
from tests.integer.programs import compiled

X = drawn(2, 3, 16)
WEIGHTS = np.random.default_rng(7).integers(-127, 128, (16, 8)).astype(np.int8)
SCALES = np.random.default_rng(8).uniform(0.001, 0.02, 8).astype(np.float32)
SAMPLES = [{"x": X}, {"x": -X}]
WEIGHT = "w = DequantizeLinear <axis = 1> (codes, scales)"
TEXT = "g (float[B, S, 16] x) => (float[B, S, 8] y) { %s }"
STATIC = f"q = QuantizeLinear (x, step, zero) d = DequantizeLinear (q, step, zero) {WEIGHT} "
CONSTANTS = {"codes": WEIGHTS, "scales": SCALES, "step": np.float32(8 / 255), "zero": np.uint8(128)}


def close(done: Outcome, steps: float, *feeds: np.ndarray) -> None:
    """No float inside, and within ``steps``, beside the error of a factor that has 15 bits."""
    assert not done.skips and not done.inside(), done.skips
    for x in feeds:
        reach = float(np.abs(done.run({"x": x})[0][0]).max())
        assert done.error({"x": x}) <= steps + reach * 2**-15


def test_a_static_product_differs_where_a_tie_is_rounded_to_the_other_side() -> None:
    done = converted(TEXT % (STATIC + "y = MatMul (d, w)"), CONSTANTS, SAMPLES)
    x = np.round(X / CONSTANTS["step"]).clip(-128, 127) * np.float32(8 / 255) * 0.999  # no ties
    close(done, 2 * done.step(), x.astype(np.float32))


@pytest.mark.parametrize("bias", (np.linspace(-2, 3, 8, dtype=np.float32), np.float32(0.5), np.float32(1e4)), ids=str)
@pytest.mark.parametrize("node", ("y = Add (p, b)", "y = Add (b, p)", "y = Sub (p, b)", "y = Sub (b, p)"))
def test_a_bias_is_added_to_the_sums(node: str, bias: np.ndarray) -> None:
    done = converted(TEXT % (f"{STATIC} p = MatMul (d, w) {node}"), CONSTANTS | {"b": bias}, SAMPLES)
    x = np.round(X / CONSTANTS["step"]).clip(-128, 127) * np.float32(8 / 255) * 0.999
    half_a_sum = 0.5 * float(SCALES.max()) * 8 / 255  # a bias is rounded to a unit of the sums
    close(done, 2 * done.step() + half_a_sum, x.astype(np.float32))
    assert "Requantize" in " ".join(done.ops())


def test_a_column_without_weights_keeps_its_bias() -> None:
    bias = {"b": np.arange(8, dtype=np.float32), "scales": np.where(np.arange(8) == 3, 0, SCALES).astype(np.float32)}
    done = converted(TEXT % (f"{STATIC} p = MatMul (d, w) y = Add (p, b)"), CONSTANTS | bias, SAMPLES)
    before, after = done.run({"x": X})
    np.testing.assert_allclose(after[0][..., 3], before[0][..., 3], rtol=0, atol=2 * done.step())


@pytest.mark.parametrize("bits", (8, 6, 4))
@pytest.mark.parametrize("symmetric", (True, False))
def test_a_product_of_tokens(bits: int, symmetric: bool) -> None:
    op = "FakeQuantizePerTokenSymmetric" if symmetric else "FakeQuantizePerToken"
    levels = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    text = TEXT % f"{WEIGHT} r = qcompile.{op} <levels = {levels}.0> (x) p = MatMul (r, w) y = Add (p, b)"
    done = converted(text, CONSTANTS | {"b": np.linspace(-1, 1, 8)}, SAMPLES)
    matrix = np.abs(WEIGHTS * SCALES)
    code = 8 / levels * float(matrix.max())  # one code of one channel may fall to the other side of a tie
    close(done, 2 * code + 2**-13 * 4 * float(matrix.sum(axis=0).max()), X, -X, 0 * X)
    finest = float(np.abs(np.subtract(*done.run({"x": X}))).mean())
    assert finest <= 0.02 * float(np.abs(done.run({"x": X})[0][0]).mean())


def test_tokens_that_something_else_reads_stay_float_and_are_told() -> None:
    text = TEXT % f"{WEIGHT} r = qcompile.FakeQuantizePerToken <levels = 255.0> (x) e = Erf (r) y = MatMul (e, w)"
    done = converted(text, CONSTANTS, SAMPLES)
    told = {skip.reason.split(" stays float")[0] for skip in done.skips}
    assert {"Erf", "FakeQuantizePerToken", "MatMul", "DequantizeLinear"} == told
    assert done.error({"x": X}) <= 1e-5


def test_the_shape_of_tokens_needs_no_floats() -> None:
    text = TEXT % (
        f"{WEIGHT} h = Neg (x) r = qcompile.FakeQuantizePerToken <levels = 255.0> (h) p = MatMul (r, w) "
        "s = Shape (r) t = Slice (s, a, e) u = Concat <axis = 0> (t, n) y = Reshape (p, u)"
    )
    done = converted(text, CONSTANTS | {"a": np.array([0]), "e": np.array([2]), "n": np.array([8])}, SAMPLES)
    assert not done.skips and not done.inside()


GAIN = np.linspace(-2, 3, 16, dtype=np.float32)


@pytest.mark.parametrize(
    "node",
    (
        "y = LayerNormalization <epsilon = 1e-5> (x, g)",
        "y = LayerNormalization <axis = -1> (x, g, b)",
        "y = LayerNormalization <axis = 2, epsilon = 1e-12> (x, g, b)",
        "y = qcompile.RMSNormalization <epsilon = 1e-6> (x, g)",
    ),
)
@pytest.mark.parametrize("reach", (1e-2, 4.0, 1e4))
def test_norms_with_gains_of_either_sign(node: str, reach: float) -> None:
    x = np.asarray(X * (reach / 4), np.float32)
    text = f"g (float[B, S, 16] x) => (float[B, S, 16] y) {{ {node} }}"
    done = converted(text, {"g": GAIN, "b": GAIN[::-1].copy()}, [{"x": x}])
    assert not done.skips and not done.inside()
    assert done.error({"x": x}) <= 3 * (2**-12 * 4 + 2**-14) + 2 * done.step()


def test_a_channel_of_small_gain_reaches_far() -> None:
    """The outlier channel of a norm has a small gain in trained models; others have large ones."""
    gain = np.full(512, 12.0, np.float32)
    gain[5] = 0.05
    x = drawn(2, 3, 512, reach=2.0)
    x[..., 5] = 900.0
    done = converted("g (float[B, S, 512] x) => (float[B, S, 512] y) { y = LayerNormalization (x, g) }", {"g": gain},
                     [{"x": x}])  # fmt: skip
    before, after = done.run({"x": x})
    assert before[0][0, 0, 5] > 1
    np.testing.assert_allclose(after[0], before[0], rtol=0, atol=12 * 2**-12)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("y = LayerNormalization <axis = 1> (x, g)", "a norm over more than the last axis"),
        ("h = Relu (x) r = ReduceMax <keepdims = 0> (h, a) y = LayerNormalization (x, g, r)", "is computed"),
    ],
)
def test_norms_that_stay_float(node: str, reason: str) -> None:
    text = f"g (float[2, 3, 16] x) => (float[2, 3, 16] y) {{ {node} }}"
    gain = np.ones((3, 16)) if "axis = 1" in node else GAIN
    done = converted(text, {"g": gain, "a": np.array([0, 1])}, [{"x": X}])
    assert any(reason in skip.reason for skip in done.skips)
    assert done.error({"x": X}) <= 1e-5


IDS = np.array([[0, 3, 9], [9, 1, 2]])


@pytest.mark.parametrize("scaled", (True, False))
def test_rows_of_a_table(scaled: bool) -> None:
    codes = np.random.default_rng(3).integers(-127, 128, (10, 8)).astype(np.int8)
    scales = np.geomspace(1e-4, 0.05, 10).astype(np.float32)
    table = {"codes": codes, "scales": scales} if scaled else {"t": (codes * scales[:, None]).astype(np.float32)}
    first = "t = DequantizeLinear <axis = 0> (codes, scales) " if scaled else ""
    text = f"g (int64[B, S] ids) => (float[B, S, 8] y) {{ {first} e = Gather (t, ids) y = Neg (e) }}"
    done = converted(text, table, [{"ids": IDS}])
    assert not done.skips and not done.inside()
    assert done.error({"ids": IDS}) <= 6.4 * 2**-14 + done.step()


def test_a_table_that_reaches_further_than_calibration_saw_stays_float() -> None:
    table = np.ones((10, 8), np.float32)
    table[7] = 1e6
    done = converted("g (int64[B, S] ids) => (float[B, S, 8] y) { e = Gather (t, ids) y = Neg (e) }", {"t": table},
                     [{"ids": IDS}])  # fmt: skip
    assert "a table reaches further than calibration saw" in done.skips[0].reason


def test_pieces_of_different_sizes_are_joined_on_one_grid() -> None:
    text = "g (float[B, S, 8] x, float[B, S, 8] z) => (float[B, S, 24] y) { y = Concat <axis = -1> (x, z, c) }"
    x, z = drawn(2, 3, 8, reach=100.0), drawn(2, 3, 8, reach=0.01)
    done = converted(text, {"c": np.full((2, 3, 8), 7.5)}, [{"x": x, "z": z}])
    assert not done.skips and not done.inside()
    assert done.error({"x": x, "z": z}) <= done.step()


def test_data_is_moved_in_integers() -> None:
    text = """g (float[B, S, 16] x) => (float[T, 8] y, float[B, 1, 16] z) {
        n = Neg (x) t = Transpose <perm = [1, 0, 2]> (n) a, b = Split <axis = 2, num_outputs = 2> (t)
        s = Add (a, b) y = Reshape (s, shape) z = GatherElements <axis = 1> (n, places) }"""
    places = np.zeros((2, 1, 16), np.int64)
    done = converted(text, {"shape": np.array([-1, 8]), "places": places}, SAMPLES)
    assert not done.skips and not done.inside()
    assert done.error({"x": X}) <= 4 * done.step("z")


def test_a_constant_too_large_for_the_grid_beside_it_stays_float() -> None:
    """Both ends of a Where are data, but calibration has seen only one."""
    text = "g (float[B, S, 16] x, bool[B, S, 16] m) => (float[B, S, 16] y) { h = Neg (x) y = Where (m, h, c) }"
    feeds = {"x": X, "m": np.ones(X.shape, bool)}
    done = converted(text, {"c": np.float32(-3e38)}, [feeds])
    assert "the constant 'c' is larger than anything that calibration saw beside it" in done.skips[0].reason
    assert done.error(feeds) <= done.step()


@pytest.mark.parametrize(
    ("changed", "text", "reason"),
    [
        ({"zero": np.int8(3)}, STATIC, "codes are int8, not uint8"),
        ({"step": np.full(16, 0.03, np.float32), "zero": np.full(16, 128, np.uint8)}, STATIC, "no one scale"),
        ({}, f"{WEIGHT} d = Neg (x) ", "not both codes"),
        ({"zeros": np.full(8, 3, np.int8)}, STATIC.replace("scales)", "scales, zeros)"), "weights have zero points"),
    ],
)
def test_products_that_stay_float(changed: dict[str, np.ndarray], text: str, reason: str) -> None:
    text = text.replace("Linear (", "Linear <axis = 2> (") if "step" in changed else text
    done = converted(TEXT % f"{text} y = MatMul (d, w)", CONSTANTS | changed, SAMPLES)
    assert any(reason in skip.reason for skip in done.skips), done.skips
    assert done.error({"x": X}) <= 0.2


def test_a_product_without_a_zero_point() -> None:
    text = TEXT % f"q = QuantizeLinear (x, step) d = DequantizeLinear (q, step) {WEIGHT} y = MatMul (d, w)"
    done = converted(text, CONSTANTS, [{"x": np.abs(X)}])
    x = np.round(np.abs(X) / CONSTANTS["step"]) * np.float32(8 / 255) * 0.999
    close(done, 2 * done.step(), x.astype(np.float32))


def test_every_rule_is_for_an_operator_that_exists() -> None:
    import onnx

    from qcompile.integer.rules import RULES

    for name in RULES:
        model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
        if not onnx.defs.has(name, 21):
            functions.use(model, name)


def test_a_table_keeps_its_name_so_that_the_length_of_positions_is_known() -> None:
    made = compiled("bert", "w8a8_static")
    assert position_limits(ir.load(made.folder / "model.onnx")) == (POSITIONS, POSITIONS)


def test_sums_of_many_terms_are_taken_to_cancel_and_those_of_few_are_not() -> None:
    few, many = np.eye(16, dtype=np.int8), drawn(2048, 3).round().astype(np.int8)
    assert rules._likely(few) == 1
    assert rules._likely(many) == np.abs(many.astype(int)).sum(axis=0).max() / 4
