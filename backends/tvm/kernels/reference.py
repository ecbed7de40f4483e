"""What the kernels compute, in NumPy: exact integers, and sums of floats in float64."""

from __future__ import annotations

import numpy as np

from qcompile.quant.numerics import affine_from_range, quantize


def matmul_integer(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x (M, K) times W (K, N), int32."""
    product: np.ndarray = x.astype(np.int32) @ weight.astype(np.int32)
    return product


def matmul_nbits(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, group: int) -> np.ndarray:
    """x (M, K) times (codes (K, N) - zero) * scale, both (K / group, N); float64."""
    rows = np.arange(codes.shape[0]) // group
    product: np.ndarray = x.astype(np.float64) @ ((codes.astype(np.float64) - zero[rows]) * scale[rows])
    return product


def matmul_nbits_int8(
    x: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, group: int
) -> np.ndarray:
    """The same with each row of x rounded to 8 bits in blocks of ``group``; float64 of exact integer sums."""
    total = np.zeros((x.shape[0], codes.shape[1]))
    for index, start in enumerate(range(0, x.shape[1], group)):
        block = x[:, start : start + group]
        top = np.abs(block).max(axis=1, keepdims=True)
        affine = affine_from_range(-top, top, bits=8, symmetric=True, signed=True)
        exact = quantize(block, affine) @ _differences(codes, zero, start, group, index)
        total += exact * affine.scale.astype(np.float64) * scale[index]
    return total


def matmul_w4a8(
    x: np.ndarray, step: np.ndarray, x_zero: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray,
    group: int,
) -> np.ndarray:  # fmt: skip
    """Codes x (M, K) with ``step`` and ``x_zero`` (M) times codes of W; float64 of exact integer sums."""
    moved: np.ndarray = x.astype(np.int32) - x_zero[:, None]
    total = np.zeros((x.shape[0], codes.shape[1]))
    for index, start in enumerate(range(0, x.shape[1], group)):
        exact = moved[:, start : start + group] @ _differences(codes, zero, start, group, index)
        total += exact * scale[index].astype(np.float64)
    scaled: np.ndarray = total * step[:, None]
    return scaled


def _differences(codes: np.ndarray, zero: np.ndarray, start: int, group: int, index: int) -> np.ndarray:
    less: np.ndarray = codes[start : start + group].astype(np.int32) - zero[index].astype(np.int32)
    return less
