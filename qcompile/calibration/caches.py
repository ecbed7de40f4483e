"""The past that a program with a quantised key/value cache is fed: codes, scales and zero points."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompile.calibration.inputs import Arrays
from qcompile.graph.caches import SCALE, ZERO_POINT
from qcompile.quant.numerics import affine_from_range, quantize


def fed(session: Any, feeds: Arrays) -> Arrays:
    """Those of ``feeds`` that ``session`` takes; a float past becomes what a quantised cache takes in its place."""
    inputs = {item.name: item for item in session.get_inputs()}
    given = {name: array for name, array in feeds.items() if name in inputs}
    for name in [name for name in inputs if name + SCALE in inputs and name in given]:
        packed = inputs[name].shape[-1] * 2 == given[name].shape[-1]
        codes, scale, zero = encode(given[name], 4 if packed else 8)
        given |= {name: codes, name + SCALE: scale, name + ZERO_POINT: zero}
    return given


def encode(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes u8, scale float, zero point u8) of keys or values (batch, heads, tokens, width), 8 or 4 bits.

    A range for each token and head. At 4 bits a byte holds channel i in its low and i + width / 2 in its high half.
    """
    low, high = (np.asarray(end(values, axis=-1, keepdims=True, initial=0)) for end in (np.min, np.max))
    affine = affine_from_range(low, high, bits, symmetric=False, signed=False)
    codes: np.ndarray = quantize(values, affine).astype(np.uint8)
    if bits == 4:
        half = codes.shape[-1] // 2
        codes = codes[..., :half] | codes[..., half:] << 4
    return codes, affine.scale.astype(np.float32), affine.zero_point.astype(np.uint8)
