"""Static, per-token and weight-only linears: the kernel that is reached, and the same function as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.backends.ort.per_token import correction_rows
from qcompile.backends.ort.weight_only import EXPANDED
from qcompile.graph import qdq
from qcompile.graph.linears import find_linears
from qcompile.graph.workspace import Workspace
from qcompile.quant.numerics import affine_from_range, quantize_weight
from qcompile.quant.schemes import WeightScheme
from tests.backends.ground import INT8, Feeds, graph, lower, normal, per_token, static, weight_only

# Integer products are exact, so only the float scaling after them rounds differently; measured: at most 4e-7.
TOLERANCE = 2e-6
K, N = 48, 40
SHAPES = [(1, 1), (2, 7)]


def pair(bias: bool = True) -> ir.Model:
    """Two linears on one input of rank 3, one with a bias, and a third behind a Gelu."""
    first = "a0 = MatMul(x, w0) a = Add(a0, b0)" if bias else "a = MatMul(x, w0)"
    text = f"""g (float[batch, seq, {K}] x) => (float[batch, seq, {N}] y) {{
        {first}
        c = MatMul(x, w1)
        s = Add(a, c)
        g = Gelu(s)
        y = MatMul(g, w2)
    }}"""
    constants = {"w0": normal(K, N, seed=1), "w1": normal(K, N, seed=2), "w2": normal(N, N, seed=3)}
    return graph(text, **constants, **({"b0": normal(N, seed=4)} if bias else {}))


def feeds(batch: int, length: int) -> Feeds:
    return {"x": normal(batch, length, K, seed=batch)}


def grouped(bits: int, size: int, symmetric: bool = True) -> WeightScheme:
    return WeightScheme(bits=bits, granularity="group", group_size=size, symmetric=symmetric, clip="minmax")


def by_column(bits: int, symmetric: bool = True) -> WeightScheme:
    return WeightScheme(bits=bits, symmetric=symmetric, clip="minmax")


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_linears_reach_the_integer_kernel(bits: int, symmetric: bool, tmp_path: Path) -> None:
    program = lower(pair(), tmp_path / "p", static(bits, by_column(8, symmetric)))
    operators = program.operators()
    assert operators["MatMulIntegerToFloat"] == 3
    assert operators["QuantizeLinear"] == 2  # one for the two linears that read x
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(operators)
    assert operators["Clip"] == (0 if bits == 8 else 2)
    for shape in SHAPES:
        assert program.difference(feeds(*shape)) < TOLERANCE
    assert all(kernel["low_bit"] for kernel in program.kernels)


def test_a_bias_joins_the_integer_kernel(tmp_path: Path) -> None:
    program = lower(pair(), tmp_path / "p", static())
    assert program.operators()["Add"] == 1  # the sum of the two linears


def test_an_output_declared_without_a_shape_keeps_the_integer_kernel(tmp_path: Path) -> None:
    model = pair(bias=False)
    model.graph.outputs[0].shape = None
    program = lower(model, tmp_path / "p", per_token(8, symmetric=False))
    assert [kernel["low_bit"] for kernel in program.kernels] == [True] * 3
    assert program.written.graph.outputs[0].shape is None


def test_the_file_holds_no_float_weights(tmp_path: Path) -> None:
    program = lower(pair(), tmp_path / "p", static())
    held = program.written.graph.initializers.values()
    assert max(v.const_value.size for v in held if v.dtype == ir.DataType.FLOAT) == N  # type: ignore[union-attr]
    assert not program.written.functions


def test_activations_with_a_scale_for_each_channel_group_say_why_not(tmp_path: Path) -> None:
    def quantise(model: ir.Model, workspace: Workspace) -> None:
        linear = find_linears(model.graph)[0]
        steps = affine_from_range(-np.linspace(1, 4, K), np.linspace(1, 4, K), 8, symmetric=False, signed=False)
        qdq.quantize_linear_weight(model, linear, quantize_weight(linear.w, INT8), workspace)
        qdq.quantize_static(model, linear.x, [(linear.node, 0)], steps, workspace, axis=2)

    model = graph(f"g (float[batch, seq, {K}] x) => (float[batch, seq, {N}] y) {{ y = MatMul(x, w) }}", w=normal(K, N))
    program = lower(model, tmp_path / "p", quantise)
    assert "activations have one scale for each channel group; the kernel takes one" in program.reasons()
    assert [(k["low_bit"], k["reason"]) for k in program.kernels] == [(False, EXPANDED)]
    assert program.difference(feeds(2, 7)) < TOLERANCE


# --------------------------------------------------------------------------- per token


def hard_rows() -> Feeds:
    """Rows of zeros, of one sign, of tiny and of huge numbers."""
    x = normal(2, 7, K, seed=5)
    x[0, 0], x[0, 1], x[0, 2] = 0, np.abs(x[0, 1]), -np.abs(x[0, 2])
    x[1, 0] *= 1e-30
    x[1, 1] *= 1e20
    return {"x": x}


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_per_token_linears_reach_the_integer_kernel(bits: int, symmetric: bool, tmp_path: Path) -> None:
    program = lower(pair(), tmp_path / "p", per_token(bits, symmetric))
    operators = program.operators()
    assert operators["MatMulIntegerToFloat"] == 3
    assert operators["QuantizeLinear"] == 2
    assert not {"MatMul", "Gemm", "Round", "BiasGelu"} & set(operators) - ({"Round"} if bits == 8 else set())
    for shape in SHAPES:
        assert program.difference(feeds(*shape)) < TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_per_token_rows_of_every_size(bits: int, symmetric: bool, tmp_path: Path) -> None:
    text = f"g (float[batch, seq, {K}] x) => (float[batch, seq, {N}] y) {{ y = MatMul(x, w) }}"
    program = lower(graph(text, w=normal(K, N)), tmp_path / "p", per_token(bits, symmetric))
    given = hard_rows()
    for row in range(7):
        for sample in range(2):
            one = {"x": given["x"][sample : sample + 1, row : row + 1]}
            if one["x"].any():
                assert program.difference(one) < TOLERANCE, (sample, row)


def test_zero_points_of_weights_and_of_8_bit_rows_do_not_go_together(tmp_path: Path) -> None:
    program = lower(pair(), tmp_path / "p", per_token(8, False, by_column(8, symmetric=False)))
    assert "weights and 8-bit activations both have zero points; the kernel corrects one of them" in program.reasons()
    assert program.difference(feeds(2, 7)) < TOLERANCE


@given(
    st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=8),
    st.integers(0, 9),
)
@settings(deadline=None)
def test_correction_rows_add_up(sums: list[int], more: int) -> None:
    count = max(-(-max(abs(s) for s in sums) // 127), 1) + more
    rows = correction_rows(np.array(sums, np.int64), count)
    assert rows.shape == (count, len(sums))
    assert np.array_equal(rows.sum(axis=0, dtype=np.int64), -np.array(sums))


# --------------------------------------------------------------------------- weight only


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [None, 16, 32, 48])
def test_low_bit_weights_reach_their_kernel(bits: int, symmetric: bool, size: int | None, tmp_path: Path) -> None:
    scheme = by_column(bits, symmetric) if size is None else grouped(bits, size, symmetric)
    program = lower(pair(), tmp_path / "p", weight_only(scheme))
    assert program.operators()["MatMulNBits"] == 3
    assert {"MatMul", "Gemm"}.isdisjoint(program.operators())
    for shape in SHAPES:
        assert program.difference(feeds(*shape)) < TOLERANCE
    assert program.entry.facts["accuracy_level"] == 1


def test_8_bit_weights_expand_and_say_so(tmp_path: Path) -> None:
    program = lower(pair(), tmp_path / "p", weight_only(INT8))
    assert {k["reason"] for k in program.kernels} == {EXPANDED}
    assert program.difference(feeds(2, 7)) < TOLERANCE
    held = program.written.graph.initializers.values()
    assert max(v.const_value.size for v in held if v.dtype == ir.DataType.FLOAT) == N  # type: ignore[union-attr]


def test_groups_that_no_block_divides_say_so(tmp_path: Path) -> None:
    program = lower(pair(), tmp_path / "p", weight_only(grouped(4, 24)))
    assert program.reasons() == {"no block of the kernel fits these groups and bits"}
