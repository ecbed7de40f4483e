"""Fake quantisation that gradients pass: the same numbers as ``quant/numerics.py``, bit for bit.

Rounding is straight-through, zero points too, so that an end of a range that is learned moves exactly what it clips.
Sources: OmniQuant (arXiv 2308.13137) section 3.2; LSQ (arXiv 1902.08153) for the gradient of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.quant.numerics import SCALE_FLOOR, QuantizedWeight, affine_from_range, code_range, quantize
from qcompile.quant.schemes import WeightScheme

START = 0.982  # of the range, as in OmniQuant: sigmoid(4)
REACH = 1.25  # an end can be so far out, so that one at the extreme is where the sigmoid moves, unlike in OmniQuant
PIECE = 1 << 16  # elements that are rounded at a time
LARGE = 1e30  # times any difference of two numbers that matter is more than one
LOGITS = (-4.0, 8.0)  # where a given start is kept: further out the sigmoid hardly moves


def _pieces(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of ``x`` of about PIECE elements, each with its part of ``others``, which broadcast to ``x``.

    What is computed from a piece stays in the processor's cache, and in memory that it already has: five times faster
    on the CPU than tensor by tensor.
    """
    axis = max(range(max(x.ndim - 1, 0)), key=lambda i: x.shape[i], default=0)
    if x.device.type != "cpu" or x.ndim < 2:
        yield x, *others
        return
    rows = max(1, PIECE * x.shape[axis] // max(x.numel(), 1))
    whole = [other.ndim != x.ndim or other.shape[axis] == 1 for other in others]
    for start in range(0, x.shape[axis], rows):
        count = min(rows, x.shape[axis] - start)
        parts = (o if w else o.narrow(axis, start, count) for o, w in zip(others, whole, strict=True))
        yield x.narrow(axis, start, count), *parts


class _OnGrid(torch.autograd.Function):
    """clamp(round(x / scale), first, last) * scale; no booleans, for which the CPU has slow code."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, first: Tensor, last: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, first, last)
        result = torch.empty_like(x)
        for part, piece, step, low, high in _pieces(result, x, scale, first, last):
            torch.mul(torch.clamp((piece / step).round_(), low, high), step, out=part)
        return result

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        x, scale, first, last = ctx.saved_tensors
        given = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums = [torch.zeros_like(scale), torch.zeros_like(first), torch.zeros_like(last)]
        taken = [slope, scale, first, last, *sums, *([] if given is None else [given])]
        for piece, out, step, low, high, to_scale, to_first, to_last, *kept in _pieces(x, *taken):
            steps = piece / step
            rounded = steps.round()
            codes = torch.clamp(rounded, low, high)
            side = rounded.sub_(codes).clamp_(-1, 1)  # -1 below the grid, 1 above it, 0 inside
            balance = side * out
            outside = side.mul_(balance)
            inside = out - outside
            to_scale += codes.mul_(out).sub_(steps.mul_(inside)).sum_to_size(step.shape)
            both, difference = outside.sum_to_size(low.shape), balance.sum_to_size(low.shape)
            to_first += (both - difference) / 2 * step
            to_last += (both + difference) / 2 * step
            for part in kept:
                part.copy_(inside)
        return given, sums[0], sums[1], sums[2]


class _Extremes(torch.autograd.Function):
    """The least and the largest element along an axis, kept; equal ones get the same gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        lo, hi = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        ctx.save_for_backward(x, lo, hi)
        return lo, hi

    @staticmethod
    def backward(ctx: Any, to_lo: Tensor, to_hi: Tensor) -> tuple[Tensor, None]:
        x, *ends = ctx.saved_tensors
        result = torch.empty_like(x)
        for part, piece, lo, hi, low, high in _pieces(result, x, *ends, to_lo, to_hi):
            torch.sub(low, (piece - lo).mul_(LARGE).clamp_(max=1).mul_(low), out=part)
            part += high - (hi - piece).mul_(LARGE).clamp_(max=1).mul_(high)
        return result, None


def extremes(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """(min, max) of ``x`` along ``axis``, which stays with length one."""
    return _Extremes.apply(x, axis)  # type: ignore[no-any-return, no-untyped-call]


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
    return fake_quantize(x, *extremes(x, -1), bits, symmetric)


class WeightClip(torch.nn.Module):
    """Learnable weight clipping (LWC): the ends of each column's or group's range, as fractions of its extremes.

    ``high`` and ``low`` (G, 1, N) are the logits of the fractions of the largest and the smallest weight, as shares of
    REACH. Relative ends follow a weight that another transform changes meanwhile; the gradient reaches the weight as
    well. ``start`` (2, G, N): fractions to start from, of the smallest and the largest, in 0..REACH.
    """

    def __init__(self, rows: int, columns: int, scheme: WeightScheme, start: np.ndarray | None = None) -> None:
        super().__init__()
        self.scheme = scheme
        self._rows = min(scheme.group_size or rows, rows)  # in a group
        whole = scheme.granularity == "per_tensor"
        shape = (-(-rows // self._rows), 1, 1 if whole else columns)
        fractions = np.full((2, *shape), START) if start is None else np.asarray(start, np.float64)[:, :, None]
        shares = np.clip(fractions / REACH, *(1 / (1 + np.exp(-np.array(LOGITS)))))
        logits = np.broadcast_to(np.log(shares / (1 - shares)), (2, *shape)).astype(np.float32)
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
        if self.scheme.granularity == "per_tensor":
            lo, hi = blocks.amin((1, 2), keepdim=True), blocks.amax((1, 2), keepdim=True)
        else:
            lo, hi = extremes(blocks, 1)
        low, high = self.fractions()
        return lo * low, hi * high

    def fractions(self) -> tuple[Tensor, Tensor]:
        """Where the ends are, as shares of the smallest and the largest weight: (G, 1, N) each."""
        return self.low.sigmoid() * REACH, self.high.sigmoid() * REACH
