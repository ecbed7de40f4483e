"""Fake quantisation that gradients pass: the same numbers as ``quant/numerics.py``, bit for bit.

Rounding is straight-through, zero points too, so that an end of a range that is learned moves exactly what it clips.
Sources: OmniQuant (arXiv 2308.13137) section 3.2; LSQ (arXiv 1902.08153) for the gradient of a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.quant.numerics import SCALE_FLOOR, QuantizedWeight, affine_from_range, code_range, quantize
from qcompile.quant.schemes import WeightScheme

START = 4.0  # of the logits: sigmoid(4) = 0.982 of the range, as in OmniQuant
LOGITS = (-4.0, 8.0)  # where a given start is kept: further out the sigmoid hardly moves


class _OnGrid(torch.autograd.Function):
    """clamp(round(x / scale), first, last) * scale, without the intermediate tensors that autograd would keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, first: Tensor, last: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, first, last)
        return torch.clamp((x / scale).round_(), first, last).mul_(scale)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        x, scale, first, last = ctx.saved_tensors
        steps = x / scale
        rounded = steps.round()
        below, above = rounded < first, rounded > last
        inside = ~(below | above)
        moved = torch.clamp(rounded, first, last).sub_(torch.where(inside, steps, 0.0)).mul_(slope)
        return (
            slope * inside if ctx.needs_input_grad[0] else None,
            moved.sum_to_size(scale.shape),
            (slope * below).sum_to_size(first.shape) * scale,
            (slope * above).sum_to_size(last.shape) * scale,
        )


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope


def round_through(x: Tensor) -> Tensor:
    """Half to even; the gradient passes as if nothing were rounded."""
    return _Round.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def fake_quantize(x: Tensor, lo: Tensor, hi: Tensor, bits: int, symmetric: bool) -> Tensor:
    """``x`` on the grid of ``numerics.affine_from_range(lo, hi)``; lo and hi broadcast to x and get gradients."""
    low, high = code_range(bits, symmetric, signed=True)
    lo, hi = lo.double().clamp(max=0), hi.double().clamp(min=0)
    if symmetric:
        scale = (torch.maximum(-lo, hi) / high).clamp(min=SCALE_FLOOR)
        zero = torch.zeros_like(scale)
    else:
        scale = ((hi - lo) / (high - low)).clamp(min=SCALE_FLOOR)
        zero = round_through(low - lo / scale).clamp(low, high)
    ends = ((low - zero).to(x.dtype), (high - zero).to(x.dtype))
    return _OnGrid.apply(x, scale.to(x.dtype), *ends)  # type: ignore[no-any-return, no-untyped-call]


def fake_quantize_per_token(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Each row of ``x`` (..., C) with the range of its own values, as ``numerics.fake_quantize_per_token``."""
    return fake_quantize(x, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits, symmetric)


class WeightClip(torch.nn.Module):
    """Learnable weight clipping (LWC): the ends of each column's or group's range, as fractions of its extremes.

    ``high`` and ``low`` (G, 1, N) are the logits of the fractions of the largest and the smallest weight. Relative
    ends follow a weight that another transform changes meanwhile; the gradient reaches the weight as well.
    ``start`` (2, G, N): fractions to start from, of the smallest and the largest, in 0..1.
    """

    def __init__(self, rows: int, columns: int, scheme: WeightScheme, start: np.ndarray | None = None) -> None:
        super().__init__()
        self.scheme = scheme
        self._rows = min(scheme.group_size or rows, rows)  # in a group
        whole = scheme.granularity == "per_tensor"
        shape = (-(-rows // self._rows), 1, 1 if whole else columns)
        logits = np.full((2, *shape), START, np.float32)
        if start is not None:
            fractions = np.clip(np.asarray(start, np.float64), *(1 / (1 + np.exp(-np.array(LOGITS)))))
            logits[:] = np.log(fractions / (1 - fractions))[:, :, None]
        self.low, self.high = (torch.nn.Parameter(torch.from_numpy(part)) for part in logits)

    def forward(self, w: Tensor) -> Tensor:
        """W (K, N), quantised with the present clip."""
        blocks = self._blocks(w)
        lo, hi = self._ends(blocks)
        quantised = fake_quantize(blocks, lo, hi, self.scheme.bits, self.scheme.symmetric)
        return quantised.reshape(-1, w.shape[1])[: w.shape[0]]

    def codes(self, w: Tensor) -> QuantizedWeight:
        """What ``forward`` gives, as codes."""
        with torch.no_grad():
            blocks = self._blocks(w.float())
            lo, hi = (end.cpu().numpy() for end in self._ends(blocks))
        affine = affine_from_range(lo, hi, self.scheme.bits, self.scheme.symmetric, signed=True)
        codes = quantize(blocks.cpu().numpy(), affine).reshape(-1, w.shape[1])[: w.shape[0]]
        scale, zero = affine.scale[:, 0], affine.zero_point[:, 0].astype(np.int8)
        if self.scheme.granularity == "group":
            return QuantizedWeight(codes.astype(np.int8), scale, zero, self._rows)
        spread = np.zeros(w.shape[1], np.int64) if scale.shape[1] == 1 else np.arange(w.shape[1])
        return QuantizedWeight(codes.astype(np.int8), scale[0, spread], zero[0, spread], None)

    def _blocks(self, w: Tensor) -> Tensor:
        """(K, N) -> (G, g, N); a last group that is shorter is filled with zeros, which every range contains."""
        missing = -w.shape[0] % self._rows
        padded = torch.nn.functional.pad(w, (0, 0, 0, missing)) if missing else w
        return padded.reshape(-1, self._rows, w.shape[1])

    def _ends(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        axes = (1, 2) if self.scheme.granularity == "per_tensor" else 1
        lo, hi = blocks.amin(axes, keepdim=True), blocks.amax(axes, keepdim=True)
        return lo * self.low.sigmoid(), hi * self.high.sigmoid()
