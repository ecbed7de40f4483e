"""Codes of weight-only formats survive the export: what a program holds is read back, code by code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.backends.onnxruntime_cpu import OnnxRuntimeCpu
from qcompile.backends.ort.weight_only import BITS, EXPANDED, Level, in_bytes
from qcompile.graph.edits import constant_array
from qcompile.quant.numerics import QuantizedWeight, quantize_weight
from qcompile.quant.schemes import WeightScheme
from tests.backends.ground import Program, graph, lower, normal, weight_only

K, N = 256, 24
TOLERANCE = 2e-6  # float products in another order; measured at most 4e-7
ROUNDED = 0.02  # level 4 rounds x to 8 bits in blocks; measured at most 6e-3
WEIGHT = normal(K, N, seed=1)


def scheme(bits: int, group: int | None, symmetric: bool) -> WeightScheme:
    if group is None:
        return WeightScheme(bits=bits, symmetric=symmetric, clip="minmax")
    return WeightScheme(bits=bits, granularity="group", group_size=group, symmetric=symmetric, clip="minmax")


def linear() -> ir.Model:
    text = f"g (float[b, s, {K}] x) => (float[b, s, {N}] y) {{ y = MatMul(x, w) }}"
    return graph(text, w=WEIGHT)


def unpacked(packed: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Bytes (N, M) -> signed codes (N, width), the first in the lowest bits of its byte."""
    share = 8 // bits
    codes = np.stack([packed >> place * bits & 2**bits - 1 for place in range(share)], axis=-1)
    signed: np.ndarray = codes.reshape(len(packed), -1)[:, :width].astype(np.int16) - 2 ** (bits - 1)
    return signed


def read_back(program: Program) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """(bits, codes (K, N), scale (K, N), zero point (K, N)) of the program's only MatMulNBits."""
    (node,) = (n for n in program.written.graph if n.op_type == "MatMulNBits")
    bits, block = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    packed, scale = (constant_array(v) for v in node.inputs[1:3])
    assert packed is not None and scale is not None
    zero = constant_array(node.inputs[3]) if len(node.inputs) > 3 else None
    blocks = scale.shape[1]
    zeros = np.zeros((N, blocks), np.int16) if zero is None else unpacked(zero.reshape(N, -1), bits, blocks)
    spread = (np.repeat(array, block, axis=1)[:, :K].T for array in (scale, zeros))
    return bits, unpacked(packed.reshape(N, -1), bits, K).T, *spread  # type: ignore[return-value]


def spread(codes: QuantizedWeight) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each element, (K, N)."""
    groups = codes.group_size or K
    return tuple(np.repeat(a.reshape(-1, N), groups, axis=0) for a in (codes.scale, codes.zero_point))  # type: ignore[return-value]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize(("bits", "level"), [(2, 1), (3, 1), (4, 1), (2, 4), (3, 4), (4, 4), (8, 4)])
def test_codes_scales_and_zero_points_come_back_as_they_went(
    bits: int, level: Level, group: int | None, symmetric: bool, tmp_path: Path
) -> None:
    chosen = scheme(bits, group, symmetric)
    program = lower(linear(), tmp_path / "p", weight_only(chosen), OnnxRuntimeCpu(accuracy_level=level))
    expected = quantize_weight(WEIGHT, chosen)
    stored, codes, scale, zero = read_back(program)
    assert stored == min(width for width in BITS[level] if width >= bits)
    np.testing.assert_array_equal(codes, expected.codes)
    np.testing.assert_array_equal(scale, spread(expected)[0])
    np.testing.assert_array_equal(zero, spread(expected)[1])
    assert program.entry.facts["accuracy_level"] == level
    for rows in (1, 7):
        feeds = {"x": normal(1, rows, K, seed=rows)}
        assert program.difference(feeds) < (TOLERANCE if level == 1 else ROUNDED)


@pytest.mark.parametrize("group", [None, 32, 64, 128])
def test_8_bits_at_level_1_expand_at_load_and_say_so(group: int | None, tmp_path: Path) -> None:
    """No kernel of this level reads them fast, and none may round x behind the recipe's back."""
    chosen = scheme(8, group, symmetric=False)
    program = lower(linear(), tmp_path / "p", weight_only(chosen))
    held = {name: constant_array(v) for name, v in program.written.graph.initializers.items()}
    codes = [array for array in held.values() if array is not None and array.shape == (K, N)]
    assert len(codes) == 1 and codes[0].dtype == np.int8
    np.testing.assert_array_equal(codes[0], quantize_weight(WEIGHT, chosen).codes)
    assert {k["kernel"]: k["reason"] for k in program.kernels} == {"MatMul": EXPANDED}
    assert program.difference({"x": normal(1, 7, K)}) < TOLERANCE


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_hold_the_first_code_in_their_lowest_bits(bits: int) -> None:
    codes = np.arange(2**bits).reshape(1, -1)[:, : 64 // bits]
    whole = int.from_bytes(in_bytes(codes, bits).tobytes(), "little")
    assert [whole >> bits * i & 2**bits - 1 for i in range(codes.size)] == codes[0].tolist()
