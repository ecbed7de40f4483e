"""Linear layers of a program through the low-bit kernels: which one ran, and the same result as without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.backends.relax import Both, both

from qcompile import backends  # isort: skip
from qcompile.backends.tvm import written
from qcompile.backends.tvm.kernels import features, host_target
from qcompile.backends.tvm.notes import Weight
from qcompile.errors import UserError

HOST = host_target()
VNNI = {"kind": "llvm", "mattr": ["+avx512f", "+avx512bw", "+avx512dq", "+avx512vl", "+avx512vnni"]}
RANDOM = np.random.default_rng(0)
rounds_x = pytest.mark.skipif(written.unit(HOST) not in written.ROUNDING_UNITS, reason="this processor has no VNNI")
with_units = pytest.mark.skipif(written.unit(HOST) not in written.UNITS, reason="no unit for 8-bit products here")


def targets() -> list[Any]:
    from tvm.target import Target

    return [HOST, Target(VNNI)] if features(HOST).unit == "amx" else [HOST]


TARGETS = [pytest.param(target, id=features(target).unit) for target in targets()]


def kernels_of(program: Both) -> list[tuple[str, bool]]:
    return [(product["kernel"], product["low_bit"]) for product in program.found.products]


def outputs(program: Both, x: np.ndarray) -> np.ndarray:
    found: np.ndarray = program.run(x=x)[1]["y"]
    return found


STATIC = """g (float[b, n, 70] x) => (float[b, n, 50] y) {
    q = QuantizeLinear (x, sx, zx)
    d = DequantizeLinear (q, sx, zx)
    m = DequantizeLinear <axis = 1> (w, sw, zw)
    y = MatMul (d, m) }"""


@with_units
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("x_dtype", "zero", "w_dtype"), [("uint8", 120, "int8"), ("int8", 0, "uint8")])
def test_integers_are_the_bits_of_the_loops(target: Any, x_dtype: str, zero: int, w_dtype: str) -> None:
    kind = np.iinfo(w_dtype)
    weights = {
        "sx": np.array(0.02, np.float32), "zx": np.array(zero, x_dtype),
        "w": RANDOM.integers(kind.min, kind.max + 1, (70, 50)).astype(w_dtype),
        "sw": RANDOM.random(50, np.float32) + np.float32(0.1),
        "zw": RANDOM.integers(kind.min, kind.max + 1, 50).astype(w_dtype),
    }  # fmt: skip
    fast, loops = both(STATIC, weights, target=target), both(STATIC, weights)
    assert kernels_of(fast) == [("matmul_integer", True)] and kernels_of(loops) == [("integer_linear", True)]
    assert "w.panels" not in fast.found.parameters and "w_panels" in fast.found.parameters
    for rows in (1, 5, 33):
        x = RANDOM.normal(size=(2, rows, 70)).astype(np.float32)
        np.testing.assert_array_equal(outputs(fast, x), outputs(loops, x))


@with_units
@pytest.mark.parametrize("target", TARGETS)
def test_an_integer_product_of_the_program(target: Any) -> None:
    weights = {"w": RANDOM.integers(-128, 128, (70, 50)).astype(np.int8), "z": np.array(7, np.uint8)}
    text = "g (uint8[b, n, 70] x) => (int32[b, n, 50] y) { y = MatMulInteger (x, w, z) }"
    program = both(text, weights, target=target)
    assert kernels_of(program) == [("matmul_integer", True)]
    program.same(x=RANDOM.integers(0, 256, (3, 7, 70)).astype(np.uint8))


def weight_only(bits: int, group: int, symmetric: bool, **options: Any) -> tuple[Both, Both]:
    high, draws = 2 ** (bits - 1), np.random.default_rng(bits)
    weights = {
        "w": draws.integers(-high, high, (64, 40)).astype(np.int8),
        "s": draws.random((64 // group, 40), np.float32) + np.float32(0.1),
        "z": draws.integers(-high, high, (64 // group, 40)).astype(np.int8) * (not symmetric),
    }
    text = (
        "g (float[b, n, 64] x) => (float[b, n, 40] y) {"
        f" d = DequantizeLinear <axis = 0, block_size = {group}> (w, s, z) y = MatMul (x, d) }}"
    )
    return both(text, weights, target=HOST, **options), both(text, weights)


@with_units
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(2, 32, False), (3, 32, True), (4, 32, True), (8, 64, False)])
def test_weights_of_few_bits(bits: int, group: int, symmetric: bool) -> None:
    fast, loops = weight_only(bits, group, symmetric)
    assert kernels_of(fast) == [("matmul_nbits", True)] and kernels_of(loops) == [("weight_only_linear", True)]
    codes = fast.found.parameters[f"w_panels{bits}"]
    assert codes.nbytes == 64 * 64 * bits // 8  # 40 columns fill two pairs of panels
    assert ("w_zeros" in fast.found.parameters) is not symmetric
    for rows in (1, 17):
        x = RANDOM.normal(size=(2, rows, 64)).astype(np.float32)
        expected = outputs(loops, x)
        assert np.abs(outputs(fast, x) - expected).max() <= 2e-6 * np.abs(expected).max()


@rounds_x
def test_level_4_rounds_x_to_8_bits() -> None:
    fast, loops = weight_only(4, 32, True, accuracy_level=4)
    assert kernels_of(fast) == [("matmul_nbits_int8", True)]
    x = RANDOM.normal(size=(2, 9, 64)).astype(np.float32)
    expected = outputs(loops, x)
    assert 1e-5 < np.abs(outputs(fast, x) - expected).max() / np.abs(expected).max() < 0.02


TOKENS = {
    "uint8": "d = qcompile.FakeQuantizePerToken <levels = 255.0> (x)",
    "int8": "d = qcompile.FakeQuantizePerTokenSymmetric <levels = 127.0> (x)",
    "static uint8": "q = QuantizeLinear (x, step, u) d = DequantizeLinear (q, step, u)",
    "static int8": "q = QuantizeLinear (x, step, i) d = DequantizeLinear (q, step, i)",
}


def few_bits(bits: int, group: int | None, tokens: str, *, symmetric: bool, **options: Any) -> Both:
    """Codes of x (.., 70) by ``tokens`` times a matrix of ``bits`` bits."""
    high, draws = 2 ** (bits - 1), np.random.default_rng(bits)
    groups = () if group is None else (-(-70 // group),)
    weights = {
        "w": draws.integers(-high, high, (70, 40)).astype(np.int8),
        "s": draws.random((*groups, 40), np.float32) + np.float32(0.1),
        "z": draws.integers(-high, high, (*groups, 40)).astype(np.int8) * (not symmetric),
        "step": np.array(0.03, np.float32), "u": np.array(117, np.uint8), "i": np.array(-9, np.int8),
    }  # fmt: skip
    layout = "axis = 1" if group is None else f"axis = 0, block_size = {group}"
    text = (
        f"g (float[b, n, 70] x) => (float[b, n, 40] y) {{ {TOKENS[tokens]}"
        f" m = DequantizeLinear <{layout}> (w, s, z) y = MatMul (d, m) }}"
    )
    return both(text, weights, **options)


@rounds_x
@pytest.mark.parametrize(
    ("tokens", "bits", "group", "symmetric"),
    [("uint8", 3, 32, False), ("int8", 4, None, True), ("static uint8", 4, 32, True), ("static int8", 2, None, False)],
)
def test_codes_times_packed_codes(tokens: str, bits: int, group: int | None, symmetric: bool) -> None:
    program = few_bits(bits, group, tokens, symmetric=symmetric, target=HOST)
    assert kernels_of(program) == [("matmul_w4a8", True)]
    assert f"w_panels{bits}" in program.found.parameters
    for rows in (1, 19):
        program.close(1e-5, x=RANDOM.normal(size=(2, rows, 70)).astype(np.float32))


@rounds_x
def test_static_sums_of_packed_codes_are_the_bits_of_bytes() -> None:
    fast, loops = (few_bits(4, None, "static uint8", symmetric=False, **held) for held in ({"target": HOST}, {}))
    assert kernels_of(fast) == [("matmul_w4a8", True)] and kernels_of(loops) == [("integer_linear", True)]
    x = RANDOM.normal(size=(2, 5, 70)).astype(np.float32)
    np.testing.assert_array_equal(outputs(fast, x), outputs(loops, x))


def test_level_4_is_refused_where_no_kernel_rounds() -> None:
    assert backends.by_name("llvm{accuracy_level=4}").target.name == "llvm{accuracy_level=4}"
    with pytest.raises(UserError, match="accuracy_level=4"):
        backends.by_name("llvm{mcpu=haswell,accuracy_level=4}").lower(None, None)  # type: ignore[arg-type]


@with_units
@pytest.mark.parametrize("group", (16, 48))
def test_groups_that_fill_no_register_stay_with_the_loops(group: int) -> None:
    weight = np.zeros((96, 16), np.int8)
    held: dict[str, np.ndarray] = {"w": weight, "s": np.ones((96 // group, 16), np.float32)}
    text = (
        "g (float[n, 96] x) => (float[n, 16] y) {"
        f" d = DequantizeLinear <axis = 0, block_size = {group}> (w, s) y = MatMul (x, d) }}"
    )
    assert kernels_of(both(text, held, target=HOST)) == [("weight_only_linear", True)]


@pytest.mark.parametrize(
    ("low", "high", "zero", "bits", "centred"),
    [(-2, 1, 0, 2, True), (-4, 3, 0, 3, True), (-8, 7, 0, 4, True), (0, 15, 8, 4, True), (0, 15, 3, 4, False),
     (-128, 127, 5, 8, False), (2, 5, 0, 3, False)],
)  # fmt: skip
def test_codes_in_the_fewest_bits(low: int, high: int, zero: int, bits: int, centred: bool) -> None:
    codes = np.tile(np.array([low, high], np.int16), (32, 8))
    weight = Weight(codes, np.ones(16, np.float32), np.full(16, zero), axis=1, block=0)
    packed = written.as_codes(weight)
    assert packed is not None and packed.bits == bits and (packed.zero is None) is centred
    zeros = 2 ** (bits - 1) if packed.zero is None else packed.zero.astype(int)
    np.testing.assert_array_equal(packed.codes.astype(int) - zeros, codes - zero)
    assert packed.codes.max() < 2**bits


@with_units
def test_a_table_of_embeddings_and_head_is_never_made_of_floats() -> None:
    weights: dict[str, np.ndarray] = {
        "codes": RANDOM.integers(-128, 128, (70, 64)).astype(np.int8), "scale": RANDOM.random(70, np.float32),
    }  # fmt: skip
    text = (
        "g (int64[b, n] ids) => (float[b, n, 70] y) { table = DequantizeLinear <axis = 0> (codes, scale)"
        " x = Gather (table, ids) turned = Transpose <perm = [1, 0]> (table) y = MatMul (x, turned) }"
    )
    program = both(text, weights, target=HOST)
    assert kernels_of(program) == [("matmul_nbits", True)]
    names = {variable.name_hint for variable in program.found.module.get_global_vars()}
    assert "gather" in names and not any("dequantize" in name for name in names), names
    program.close(2e-6, ids=np.array([[0, 69, 7]]))


# --------------------------------------------------------------------------- attention


@rounds_x
@pytest.mark.parametrize(("groups", "bias"), [(1, "b, 1, s, t"), (3, "t")])
def test_attention_in_one_pass_over_the_keys(groups: int, bias: str) -> None:
    call = f"GroupedAttention <scale = 0.25, groups = {groups}>" if groups > 1 else "Attention <scale = 0.25>"
    kept = "b, " + str(6 // groups)
    text = (
        f"g (float[b, 6, s, 32] q, float[{kept}, t, 32] k, float[{kept}, t, 16] v, float[{bias}] m)"
        f" => (float[b, 6, s, 16] y) {{ y = qcompile.{call} (q, k, v, m) }}"
    )
    program = both(text, target=HOST)
    names = {variable.name_hint for variable in program.found.module.get_global_vars()}
    assert "attention" in names and not any("weights" in name for name in names)
    for batch, rows, keys in ((2, 1, 1), (1, 3, 16), (2, 5, 150)):
        sides = (6, rows, 32), (6 // groups, keys, 32), (6 // groups, keys, 16)
        q, k, v = (RANDOM.normal(size=(batch, *held)).astype(np.float32) for held in sides)
        shape = (batch, 1, rows, keys) if groups == 1 else (keys,)
        mask = np.where(RANDOM.random(shape) < 0.4, np.finfo(np.float32).min, 0).astype(np.float32)
        mask[..., : keys // 2] = np.finfo(np.float32).min  # more than a chunk that weighs nothing
        program.close(2e-6, q=3 * q, k=k, v=v, m=mask)


@rounds_x
def test_a_score_that_is_no_number_spoils_its_row_alone() -> None:
    text = (
        "g (float[1, 1, s, 16] q, float[1, 1, t, 16] k, float[1, 1, t, 16] v, float[t] m)"
        " => (float[1, 1, s, 16] y) { y = qcompile.Attention <scale = 1.0> (q, k, v, m) }"
    )
    q, k = (np.ones((1, 1, side, 16), np.float32) for side in (2, 20))
    q[0, 0, 1, 3] = np.nan
    y = both(text, target=HOST).run(q=q, k=k, v=k, m=np.zeros(20, np.float32))[1]["y"]
    assert (y[0, 0, 0] == 1).all() and np.isnan(y[0, 0, 1]).all()


def test_a_cache_and_what_it_grows_by_are_copied_row_by_row() -> None:
    text = (
        "g (float[b, 3, p, 8] past, float[b, n, 24] x) => (float[b, 3, t, 8] y, float[b, q, 24] z) {"
        " heads = Reshape (x, shape) new = Transpose <perm = [0, 2, 1, 3]> (heads) y = Concat <axis = 2> (past, new)"
        " z = Concat <axis = 1> (one, x, x) }"
    )
    weights = {"shape": np.array([0, 0, 3, 8]), "one": np.ones((1, 2, 24), np.float32)}
    program = both(text, weights, target=HOST)
    names = {variable.name_hint for variable in program.found.module.get_global_vars()}
    assert {"joined", "joined1"} <= names and "concat" not in names
    for past, length in ((5, 1), (0, 4), (3, 0)):
        drawn = (RANDOM.normal(size=size).astype(np.float32) for size in ((1, 3, past, 8), (1, length, 24)))
        program.same(**dict(zip(("past", "x"), drawn, strict=True)))
