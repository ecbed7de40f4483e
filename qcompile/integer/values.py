"""What a float value of the quantised graph becomes in integers."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class Wide:
    """int32 on a fixed-point grid: real = value * 2^-places, |value| <= bound < 2^31."""

    value: ir.Value
    places: int
    bound: int


@dataclasses.dataclass(frozen=True)
class Codes:
    """uint8 with one range from calibration: real = (value - zero) * scale."""

    value: ir.Value
    scale: float
    zero: int


@dataclasses.dataclass(frozen=True)
class Rows:
    """uint8 with the range of each token: real = (codes - zero) * step / (2^16 divisor) * 2^(33 - bits) * 2^-places.

    codes: (..., C) uint8; zero, step, divisor: (..., 1) int32
    """

    codes: ir.Value
    zero: ir.Value
    step: ir.Value
    divisor: ir.Value
    places: int
    bits: int


@dataclasses.dataclass(frozen=True)
class Weight:
    """A constant matrix: codes (K, N) int8 without zero points, scale (N,). ``source``: where codes stand in the graph.

    ``transposed``: they stand there as a table (N, K).
    """

    source: ir.Value
    codes: np.ndarray
    scale: np.ndarray
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """An embedding: codes (V, C) int8 or float32, and for codes a scale for each row (V,)."""

    source: ir.Value
    array: np.ndarray
    scale: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Sums:
    """A product before it is scaled: real = value * factor [* rows' step], factor (N,); |value| <= bound.

    likely: with rows, where |value| saturates; the bound is for codes that all differ most from zero
    """

    value: ir.Value
    factor: np.ndarray
    bound: int
    rows: Rows | None = None
    likely: float = 0.0


Held = Wide | Codes | Rows | Weight | Table | Sums
