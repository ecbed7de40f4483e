"""Operators in TVM against ONNX Runtime: integers to the bit, floats up to rounding, dims dynamic."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.backends.tvm.translate import check, translate
from qcompile.errors import UserError
from tests.backends.relax import both

RANDOM = np.random.default_rng(0)
EDGES = np.array([0, 1, -1, 2, -2, 3, -3, 7, -7, 127, -128, 2**15, -(2**15), 2**30, -(2**30)], np.int32)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def test_integer_arithmetic_is_that_of_onnx() -> None:
    """Div cuts towards zero, Mod has the sign of the divisor or of the dividend, and so on."""
    program = both("""g (int32[n, m] x, int32[m] y) => (int32[n, m] a, int32[n, m] b, int32[n, m] c, int32[n, m] d,
        int32[n, m] e, int32[n, m] f) {
        a = Div (x, y)
        b = Mod (x, y)
        c = Mod <fmod = 1> (x, y)
        s = Sign (x)
        t = Abs (y)
        d = Max (s, t, x)
        low = Constant <value = int32 {-100}> ()
        high = Constant <value = int32 {100}> ()
        e = Clip (x, low, high)
        n1 = Neg (x)
        f = Min (n1, y)
    }""")
    x, y = np.meshgrid(EDGES, EDGES[EDGES != 0], indexing="ij")
    program.same(x=np.ascontiguousarray(x), y=np.ascontiguousarray(y[0]))


@pytest.mark.parametrize("divisor", (2, 3, 256, 65535))
def test_division_by_a_constant(divisor: int) -> None:
    program = both(f"""g (int32[n] x) => (int32[n] y) {{
        d = Constant <value = int32 {{{divisor}}}> ()
        y = Div (x, d)
    }}""")
    program.same(x=RANDOM.integers(-(2**31) + 1, 2**31 - 1, 999).astype(np.int32))


def test_shifts_are_of_unsigned_numbers() -> None:
    program = both("""g (uint32[n] x, uint32[n] y) => (uint32[n] a, uint32[n] b) {
        a = BitShift <direction = "LEFT"> (x, y)
        b = BitShift <direction = "RIGHT"> (x, y)
    }""")
    program.same(x=RANDOM.integers(0, 2**32, 64).astype(np.uint32), y=np.arange(64, dtype=np.uint32) % 32)


@pytest.mark.parametrize("kind", ("uint8", "int8"))
def test_quantisation_rounds_halves_to_even_and_saturates(kind: str) -> None:
    program = both(
        f"g (float[n] x) => ({kind}[n] q, float[n] y) {{ q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z) }}",
        {"s": np.float32(0.5), "z": np.array(3, kind)},
    )
    program.same(x=np.concatenate([np.arange(-80, 80, 0.25, np.float32), normal(64) * 300]))


def test_quantisation_at_run_time() -> None:
    program = both("g (float[n, m] x) => (uint8[n, m] q, float s, uint8 z) { q, s, z = DynamicQuantizeLinear (x) }")
    for values in (normal(5, 7), np.abs(normal(3, 4)), -np.abs(normal(2, 9))):
        program.same(x=values)


@pytest.mark.parametrize("tiles", (True, False))
@pytest.mark.parametrize("kind", ("uint8", "int8"))
def test_integer_products_and_their_zero_points(kind: str, tiles: bool) -> None:
    weight = RANDOM.integers(-128, 128, (40, 48)).astype(np.int8)
    program = both(
        f"g ({kind}[b, n, 40] x) => (int32[b, n, 48] y, int32[b, n, 48] c) {{"
        " y = MatMulInteger (x, w, z) c = MatMulInteger (x, w) }",
        {"w": weight, "z": np.array(3, kind)}, tiles=tiles,
    )  # fmt: skip
    low = np.iinfo(kind).min
    for shape in ((1, 1), (2, 5), (3, 8)):
        program.same(x=RANDOM.integers(low, low + 256, (*shape, 40)).astype(kind))


def test_integer_products_of_activations() -> None:
    program = both("""g (uint8[b, n, k] x, int8[b, k, m] y) => (int32[b, n, m] z) {
        zero = Constant <value = uint8 {7}> ()
        z = MatMulInteger (x, y, zero)
    }""")
    for n, k, m in ((1, 3, 1), (5, 8, 17), (16, 1, 33)):
        x, y = RANDOM.integers(0, 256, (2, n, k)), RANDOM.integers(-128, 128, (2, k, m))
        program.same(x=x.astype(np.uint8), y=y.astype(np.int8))


@pytest.mark.parametrize("bits", (2, 4, 8))
@pytest.mark.parametrize("group", (16, 64))
def test_packed_weights(bits: int, group: int) -> None:
    high = 2 ** (bits - 1)
    weights = {
        "w": RANDOM.integers(-high, high, (64, 32)).astype(np.int8),
        "s": np.abs(normal(64 // group, 32)) + 0.1,
        "z": RANDOM.integers(-high, high, (64 // group, 32)).astype(np.int8),
    }
    program = both(
        f"g (float[b, n, 64] x) => (float[b, n, 32] y) {{"
        f" d = DequantizeLinear <axis = 0, block_size = {group}> (w, s, z) y = MatMul (x, d) }}",
        weights,
    )
    program.close(1e-5, x=normal(2, 3, 64))
    held = {name: array.nbytes for name, array in program.found.parameters.items()}
    assert min(held[name] for name in held if "codes" in name) == 64 * 32 * bits // 8
    assert [p["kernel"] for p in program.found.products] == ["weight_only_linear"]


def test_a_static_linear_runs_on_its_codes() -> None:
    weights = {
        "sx": np.float32(0.02), "zx": np.uint8(120), "w": RANDOM.integers(-127, 128, (32, 16)).astype(np.int8),
        "sw": np.abs(normal(16)) + 0.1, "bias": normal(16),
    }  # fmt: skip
    program = both(
        """g (float[b, n, 32] x) => (float[b, n, 16] y) {
        q = QuantizeLinear (x, sx, zx)
        d = DequantizeLinear (q, sx, zx)
        m = DequantizeLinear <axis = 1> (w, sw)
        p = MatMul (d, m)
        y = Add (p, bias) }""",
        weights,
    )
    program.close(1e-6, x=normal(2, 5, 32))
    assert [(p["kernel"], p["low_bit"]) for p in program.found.products] == [("integer_linear", True)]


def test_rows_and_what_picks_from_them() -> None:
    program = both(
        """g (float[b, n, 24] x, int64[b, n] ids) => (float[b, n, 24] y, float[b, n, 1] t, float[b, n, 24] l, int64[b, n] c,
        float[b, n, 6] e) {
        y = Softmax <axis = -1> (x)
        last = Constant <value_ints = [-1]> ()
        t = ReduceMean (x, last)
        l = LayerNormalization <axis = -1> (x, gain, offset)
        one = Constant <value_int = 1> ()
        c = CumSum (ids, one)
        e = Gather (table, ids) }""",
        {"gain": normal(24), "offset": normal(24), "table": normal(9, 6)},
    )
    program.close(1e-5, x=normal(2, 7, 24) * 5, ids=RANDOM.integers(-9, 9, (2, 7)))


def test_shapes_are_computed_when_the_program_is_compiled() -> None:
    """Heads split and joined again, a mask of the length, and positions: no shape is a tensor at run time."""
    program = both("""g (float[batch, tokens, 12] x) => (float[batch, tokens, 12] y, bool[tokens, tokens] m,
        float[batch, rest, 12] z) {
        shape = Shape (x)
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        length = Gather (shape, one)
        lead = Slice (shape, first, two, first)
        split = Concat <axis = 0> (lead, heads)
        h = Reshape (x, split)
        t = Transpose <perm = [0, 2, 1, 3]> (h)
        back = Transpose <perm = [0, 2, 1, 3]> (t)
        y = Reshape (back, shape)
        positions = Range (zero, length, one)
        column = Unsqueeze (positions, ones)
        m = LessOrEqual (positions, column)
        z = Slice (x, ones, far, ones)
    }""", {
        "first": np.array([0]), "two": np.array([2]), "heads": np.array([3, 4]), "ones": np.array([1]),
        "far": np.array([2**63 - 1]),
    })  # fmt: skip
    for size in ((1, 1), (2, 5)):
        program.same(x=normal(*size, 12))
    names = [f.name_hint for f in program.found.module.functions]
    assert not any("shape" in name for name in names)


def test_an_operator_without_translation_is_refused_by_name() -> None:
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => (float[n] y) { y = Det (x) }')
    model = ir.from_proto(proto)
    model.graph[0].name = "head.det"
    for refuse in (check, translate):
        with pytest.raises(UserError) as error:
            refuse(model)
        assert "Det" in error.value.message
        assert "head.det" in str(error.value.where)
        assert "cpu" in str(error.value.hint)
