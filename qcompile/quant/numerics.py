"""The one file that rounds: quantise, dequantise and choose scales. Pure NumPy.

Rounding is half to even, as in ONNX QuantizeLinear. A range always contains zero, so that zero is exact.
Sources: ONNX QuantizeLinear-21; Outlier Suppression+ (arXiv 2304.09145) section 4.1; spec of the schemes in
``schemes.py``.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from qcompile.errors import UserError
from qcompile.quant.schemes import WeightScheme

SCALE_FLOOR = float(np.finfo(np.float32).tiny)
MSE_SHRINKS = np.linspace(1.0, 0.4, 13)  # candidate clips, as a fraction of the min-max range
CLIP_BELOW_BITS = 6  # from 6 bits on, a clip cuts off about as much as it gains in rounding


@dataclasses.dataclass(frozen=True)
class Affine:
    """``real = (code - zero_point) * scale``, codes in ``low..high``; arrays broadcast over the tensor."""

    scale: np.ndarray
    zero_point: np.ndarray
    low: int
    high: int

    @property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest real value, float32."""
        lo, hi = (((code - self.zero_point) * self.scale).astype(np.float32) for code in (self.low, self.high))
        return lo, hi


def code_range(bits: int, symmetric: bool, signed: bool) -> tuple[int, int]:
    """Smallest and largest code. Symmetric ranges are restricted (-127..127 at 8 bits)."""
    if symmetric:
        high = 2 ** (bits - 1) - 1
        return (-high, high) if signed else (2 ** (bits - 1) - high, 2 ** (bits - 1) + high)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def affine_from_range(lo: ArrayLike, hi: ArrayLike, bits: int, symmetric: bool, signed: bool) -> Affine:
    """Scale and zero point that cover ``lo..hi`` (any broadcastable shape) and zero.

    Asymmetric: scale = (hi - lo) / (2^b - 1), zero_point = round(low - lo / scale).
    Symmetric: scale = max(-lo, hi) / (2^(b-1) - 1); the zero point is 0 (signed) or 2^(b-1).
    """
    low, high = code_range(bits, symmetric, signed)
    lo = np.minimum(np.asarray(lo, np.float64), 0.0)
    hi = np.maximum(np.asarray(hi, np.float64), 0.0)
    if symmetric:
        scale = np.maximum(np.maximum(-lo, hi) / ((high - low) / 2), SCALE_FLOOR)
        zero = np.full_like(scale, (high + low) / 2)
    else:
        scale = np.maximum((hi - lo) / (high - low), SCALE_FLOOR)
        zero = np.clip(np.rint(low - lo / scale), low, high)
    return Affine(np.asarray(scale, np.float32), np.asarray(zero, np.int32), low, high)


def quantize(x: np.ndarray, affine: Affine) -> np.ndarray:
    """Codes of ``x`` as int32, saturated to the range of ``affine``."""
    codes = _steps(x, affine)
    codes += affine.zero_point
    saturated: np.ndarray = np.clip(codes, affine.low, affine.high, out=codes).astype(np.int32)
    return saturated


def _steps(x: np.ndarray, affine: Affine) -> np.ndarray:
    """``x`` in whole steps; infinite where a tiny scale overflows, which saturates."""
    with np.errstate(over="ignore"):
        steps: np.ndarray = np.asarray(x / affine.scale)
    np.rint(steps, out=steps)
    return steps


def dequantize(codes: np.ndarray, affine: Affine) -> np.ndarray:
    """float32 values of ``codes``."""
    values: np.ndarray = ((codes - affine.zero_point) * affine.scale).astype(np.float32)
    return values


def fake_quantize(x: np.ndarray, affine: Affine) -> np.ndarray:
    """``dequantize(quantize(x))`` in float32 without the detour through integers."""
    y = _steps(x, affine)
    low = (affine.low - affine.zero_point).astype(np.float32)
    high = (affine.high - affine.zero_point).astype(np.float32)
    np.clip(y, low, high, out=y)
    y *= affine.scale
    return y


def fake_quantize_per_token(x: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """Each row of ``x`` [..., C] with the range of its own values: what the runtime function does."""
    lo = np.minimum(x.min(axis=-1, keepdims=True), 0)
    hi = np.maximum(x.max(axis=-1, keepdims=True), 0)
    return fake_quantize(x, affine_from_range(lo, hi, bits, symmetric, signed=False))


def clip_tokens(x: np.ndarray, reach: float) -> np.ndarray:
    """Each row of ``x`` [..., C] cut to ``reach``, a share, of its own range: what the runtime function does."""
    lo = np.minimum(x.min(axis=-1, keepdims=True), 0) * np.float32(reach)
    hi = np.maximum(x.max(axis=-1, keepdims=True), 0) * np.float32(reach)
    clipped: np.ndarray = np.clip(x, lo, hi)
    return clipped


# --------------------------------------------------------------------------- weights


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """Codes [K, N] int8, scale and zero point [N] or, with groups along K, [ceil(K / g), N]."""

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    group_size: int | None

    def dequantized(self) -> np.ndarray:
        """W [K, N] float32 as the program will see it."""
        scale, zero = self.scale, self.zero_point.astype(np.int32)
        if self.group_size is not None:
            rows = np.arange(self.codes.shape[0]) // self.group_size
            scale, zero = scale[rows], zero[rows]
        values: np.ndarray = ((self.codes.astype(np.int32) - zero) * scale).astype(np.float32)
        return values


def fake_quantize_weight(w: np.ndarray, scheme: WeightScheme, energy: np.ndarray | None = None) -> np.ndarray:
    """What ``quantize_weight(w, scheme).dequantized()`` gives, without making codes."""
    if scheme.group_size is not None:
        return quantize_weight(w, scheme, energy).dequantized()
    lo, hi = _range(w.min(axis=0), w.max(axis=0), scheme)
    return fake_quantize(w, _weight_affine(lo, hi, w, scheme, energy))


def quantize_weight(w: np.ndarray, scheme: WeightScheme, energy: np.ndarray | None = None) -> QuantizedWeight:
    """Quantise W [K, N] along its output columns; a last group that K does not fill is a shorter group.

    ``energy`` (K,): mean square of each input channel, the weight of its row's error in the search for the
    clip (the diagonal of the layer's Hessian); all rows count alike when it is None.
    """
    if w.ndim != 2:
        raise UserError(f"a weight of rank {w.ndim} cannot be quantised per channel", hint="give a matrix [K, N]")
    k, n = w.shape
    group = scheme.group_size
    if group is None or group >= k:
        lo, hi = _range(w.min(axis=0), w.max(axis=0), scheme)
        affine = _weight_affine(lo, hi, w, scheme, energy)
        codes = quantize(w, affine)
        return _packed(codes, affine, None if group is None else k)
    padded = np.zeros((-(-k // group) * group, n), np.float32)
    padded[:k] = w
    blocks = padded.reshape(-1, group, n)
    lo, hi = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    if energy is not None:
        energy = np.pad(energy, (0, padded.shape[0] - k)).reshape(-1, group)
    affine = _weight_affine(lo, hi, blocks, scheme, energy)
    codes = quantize(blocks, affine).reshape(-1, n)[:k]
    flat = Affine(affine.scale[:, 0], affine.zero_point[:, 0], affine.low, affine.high)
    return _packed(codes, flat, group)


def _range(lo: np.ndarray, hi: np.ndarray, scheme: WeightScheme) -> tuple[np.ndarray, np.ndarray]:
    if scheme.granularity == "per_tensor":
        return np.full_like(lo, lo.min()), np.full_like(hi, hi.max())
    return lo, hi


def _weight_affine(
    lo: np.ndarray, hi: np.ndarray, w: np.ndarray, scheme: WeightScheme, energy: np.ndarray | None
) -> Affine:
    best = affine_from_range(lo, hi, scheme.bits, scheme.symmetric, signed=True)
    if scheme.clip == "minmax" or scheme.granularity == "per_tensor" or scheme.bits >= CLIP_BELOW_BITS:
        return best
    error = _column_error(w, best, energy)
    scale, zero = best.scale.copy(), best.zero_point.copy()
    for shrink in MSE_SHRINKS[1:]:
        trial = affine_from_range(lo * shrink, hi * shrink, scheme.bits, scheme.symmetric, signed=True)
        trial_error = _column_error(w, trial, energy)
        better = trial_error < error
        np.copyto(error, trial_error, where=better)
        np.copyto(scale, trial.scale, where=better)
        np.copyto(zero, trial.zero_point, where=better)
    return Affine(scale, zero, best.low, best.high)


def _column_error(w: np.ndarray, affine: Affine, energy: np.ndarray | None) -> np.ndarray:
    """Squared error of each column of w (..., K, N), rows weighted by ``energy`` (..., K)."""
    difference = fake_quantize(w, affine)
    difference -= w
    difference *= difference
    if energy is not None:
        difference *= energy[..., None]
    error: np.ndarray = difference.sum(axis=-2)
    return error.reshape(affine.scale.shape)


def _packed(codes: np.ndarray, affine: Affine, group: int | None) -> QuantizedWeight:
    scale = np.atleast_1d(affine.scale)
    zero = np.atleast_1d(affine.zero_point)
    if group is not None and scale.ndim == 1:
        scale, zero = scale[None], zero[None]
    return QuantizedWeight(codes.astype(np.int8), scale, zero.astype(np.int8), group)
