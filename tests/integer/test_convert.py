"""The walk: floats enter and leave at the boundary, what has no integer form is told."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from qcompile.calibration.runner import open_session
from qcompile.integer.positions import PLACES
from tests.integer.graphs import FLOATS, converted, drawn

X = drawn(2, 3, 16)
SAMPLES = [{"x": X}]
ISLAND = "g (float[B, S, 16] x) => (float[B, S, 16] y) { a = Neg (x) b = Erf (a) y = Add (b, c) }"
ROW = {"c": np.linspace(-1, 1, 16)}


def test_an_operator_without_an_integer_form_stays_between_integers() -> None:
    done = converted(ISLAND, ROW, SAMPLES)
    ops = done.ops()
    assert ops.count("Erf") == 1
    place = ops.index("Erf")
    assert ops[place - 2 : place] == ["Cast", "Mul"]  # to floats
    assert ops[place + 1 : place + 5] == ["Mul", "Clip", "Round", "Cast"]  # and back
    assert "Neg" in ops[:place] and "Add" in ops[place:]
    (skip,) = done.skips
    assert (skip.node, skip.site) == ("Erf:b", "Erf:b")
    assert skip.reason == "Erf stays float: it has no integer form"
    assert done.error({"x": X}) <= 4 * done.step("a") + 2 * done.step()


def test_names_types_and_axes_of_inputs_and_outputs_stay() -> None:
    done = converted(ISLAND, ROW, SAMPLES)
    before, after = (onnx.load_from_string(model).graph for model in (done.before, done.after))
    assert [port.name for port in before.input] == [port.name for port in after.input]
    assert [port.SerializeToString() for port in before.output] == [port.SerializeToString() for port in after.output]


def test_an_output_in_the_middle_is_read_on_in_integers() -> None:
    text = "g (float[B, S, 16] x) => (float[B, S, 16] a, float[B, S, 16] y) { a = Neg (x) y = Add (a, x) }"
    done = converted(text, {}, SAMPLES)
    assert not done.skips and done.ops().count("Round") == 1
    assert done.error({"x": X}) <= 2 * done.step()


def test_a_model_that_only_hands_on() -> None:
    text = "g (float[B, S, 16] x) => (float[B, S, 16] y, float[B, S, 16] z) { y = Identity (x) z = Relu (x) }"
    done = converted(text, {}, SAMPLES)
    assert done.error({"x": X}) <= done.step("z")


def test_a_float_that_stays_float_is_not_rounded_for_others_that_do() -> None:
    """Integers read the result of Erf as well; the second Erf must not see what they see."""
    text = """g (float[B, S, 16] x) => (float[B, S, 16] y, float[B, S, 16] z) {
        a = Erf (x) y = Neg (a) z = Erf (a) }"""
    done = converted(text, {}, SAMPLES)
    before, after = done.run({"x": X})
    np.testing.assert_array_equal(before[1], after[1])


def test_no_float_is_left_untold() -> None:
    """Erf reads what an integer form exists for, from a value that integers read too."""
    text = """g (float[B, S, 16] x) => (float[B, S, 16] y, float[B, S, 16] z) {
        w = DequantizeLinear <axis = 1> (codes, scales) r = qcompile.FakeQuantizePerToken <levels = 255.0> (x)
        y = MatMul (r, w) z = Erf (r) }"""
    held = {"codes": np.eye(16, dtype=np.int8), "scales": np.ones(16)}
    done = converted(text, held, SAMPLES)
    told = {skip.node.split(":")[0] for skip in done.skips}
    left = {node.op_type for node in done.converter.model.graph if any(v.dtype in FLOATS for v in node.outputs)}
    assert told == {"Erf", "FakeQuantizePerToken"}
    assert left - {"Mul", "Clip", "Round", "Cast"} == told
    assert done.error({"x": X}) <= 0.02


def test_a_model_whose_output_is_made_of_codes() -> None:
    text = """g (float[B, S, 16] x) => (float[B, S, 16] y) {
        q = QuantizeLinear (x, step, zero) y = DequantizeLinear (q, step, zero) }"""
    done = converted(text, {"step": np.float32(0.05), "zero": np.uint8(100)}, SAMPLES)
    assert not done.skips
    assert done.error({"x": X}) <= 0.0501
    done = converted(
        "g (float[B, S, 16] x) => (float[B, S, 16] y) { y = qcompile.FakeQuantizePerToken <levels = 255.0> (x) }",
        {}, SAMPLES,
    )  # fmt: skip
    assert "an output reads it as floats" in done.skips[0].reason


def test_a_rotary_embedding_turns_by_its_tables() -> None:
    text = """g (float[B, 2, S, 8] x, int64[B, S] p) => (float[B, 2, S, 8] y) {
        f = Cast <to = 1> (p) u = Unsqueeze (f, last) t = Mul (u, row) e = Concat <axis = -1> (t, t)
        c0 = Cos (e) s0 = Sin (e) c = Unsqueeze (c0, one) s = Unsqueeze (s0, one)
        n = Neg (x) r = qcompile.RotaryEmbedding (n, c, s) y = Neg (r) }"""
    held = {"last": np.array([2]), "one": np.array([1]), "row": np.geomspace(1, 0.01, 4)[None, None]}
    feeds = {"x": drawn(2, 2, 5, 8), "p": np.array([[0, 1, 2, 3, 4], [60, 61, 62, 63, 7]])}
    done = converted(text, held, [feeds])
    assert not done.skips and not done.inside()
    assert done.error(feeds) <= 2 * done.step("n") + 4 * 2 * 2.0**-PLACES
    done = converted(text.replace("c0 = Cos (e)", "q = ReduceMax <keepdims = 1> (e, one) c0 = Cos (q)"), held, [feeds])
    assert any("its cosines are no function of one position" in skip.reason for skip in done.skips)


def test_nodes_are_in_an_order_that_runs() -> None:
    done = converted(ISLAND, ROW, SAMPLES)
    known: set[int] = {id(v) for v in (*done.converter.model.graph.inputs,)}
    known |= {id(v) for v in done.converter.model.graph.initializers.values()}
    for node in done.converter.model.graph:
        assert all(v is None or id(v) in known for v in node.inputs)
        known |= {id(v) for v in node.outputs}
    open_session(ir.to_proto(done.converter.model).SerializeToString(), threads=1)
