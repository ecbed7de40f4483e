"""Weights as the CUDA kernels read them."""

from __future__ import annotations

import numpy as np

from qcompile.errors import UserError

DEPTH, STEP = 128, 32  # rows of a piece for tensor cores, and of one for a lane


def columns_first(weight: np.ndarray) -> np.ndarray:
    """W (K, N) int8 -> (N, K), for both kernels of int8."""
    if weight.shape[0] % 16:
        raise UserError(f"{weight.shape[0]} rows do not fill 16-byte loads", hint="fill K up to a multiple of 16")
    return np.ascontiguousarray(weight.T)


def codes_for_rows(codes: np.ndarray) -> np.ndarray:
    """Codes uint8 (K, N) of 4 bits -> uint32 (N, K / 8) for few rows: nibbles are rows 0 2 4 6 1 3 5 7."""
    _check(codes)
    eights = codes.T.reshape(codes.shape[1], -1, 4, 2)  # (N, K / 8, pair, which)
    nibbles = np.concatenate([eights[..., 0], eights[..., 1]], axis=-1).astype(np.uint32)
    return _words(nibbles)


def codes_for_gemm(codes: np.ndarray) -> np.ndarray:
    """Codes uint8 (K, N) of 4 bits -> uint32 (N / 8, K / 128, 32, 4) for tensor cores; what is missing is filled up.

    Lane l has column l / 4; half-word s has rows 16 s + 2 (l % 4) + {0, 8, 1, 9}, the lowest nibble first.
    """
    _check(codes)
    (rows, columns), depth = codes.shape, -(-codes.shape[0] // DEPTH) * DEPTH
    padded = np.zeros((depth, -(-columns // 8) * 8), np.uint8)
    padded[:rows, :columns] = codes
    # k = 128 piece + 16 part + 8 high + 2 quarter + low
    split = padded.reshape(depth // DEPTH, 8, 2, 4, 2, -1, 8)  # (piece, part, high, quarter, low, eight, column)
    lanes = split.transpose(5, 0, 6, 3, 1, 4, 2)  # (eight, piece, column, quarter, part, low, high)
    nibbles = lanes.reshape(lanes.shape[0], lanes.shape[1], 32, 4, 8).astype(np.uint32)
    return _words(nibbles)


def _words(nibbles: np.ndarray) -> np.ndarray:
    shifts = np.arange(8, dtype=np.uint32) * np.uint32(4)
    words: np.ndarray = np.ascontiguousarray(np.bitwise_or.reduce(nibbles << shifts, axis=-1))
    return words


def _check(codes: np.ndarray) -> None:
    if codes.shape[0] % STEP:
        raise UserError(f"{codes.shape[0]} rows do not fill pieces of {STEP}", hint="fill K up to a multiple of 32")
    if codes.max(initial=0) > 15:
        raise UserError(f"a code of {codes.max()} does not fit 4 bits", hint="codes are 0 .. 15")
