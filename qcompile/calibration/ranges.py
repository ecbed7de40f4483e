"""Static ranges of activations: streamed once, whatever the observer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.calibration.observers import (
    AverageMinMax,
    ChannelRange,
    MeanSquaredError,
    MinMax,
    Percentile,
    TokenWise,
    observe,
)
from qcompile.pipeline import Context
from qcompile.quant.numerics import Affine, affine_from_range
from qcompile.quant.schemes import ActivationScheme


class ChannelEnergy:
    """Mean square of every channel, (C,), of rows brought to length one.

    The diagonal of the next linear's Hessian, with every token counting alike: a sink token a thousand times
    larger than the rest would otherwise own it.
    """

    def __init__(self) -> None:
        self._sum: np.ndarray | None = None
        self._count = 0

    def update(self, rows: np.ndarray) -> None:
        square = np.square(rows, dtype=np.float64)
        square = (square / np.maximum(square.sum(axis=1, keepdims=True), 1e-30)).sum(axis=0)
        self._sum = square if self._sum is None else self._sum + square
        self._count += rows.shape[0]

    @property
    def mean(self) -> np.ndarray | None:
        return None if self._sum is None else (self._sum / max(self._count, 1)).astype(np.float32)


def make_observer(scheme: ActivationScheme) -> Any:
    """A fresh observer of the kind that ``scheme`` names."""
    if scheme.granularity == "channel_group" or scheme.outlier_threshold is not None:
        return ChannelRange()
    if scheme.observer == "mse":
        return MeanSquaredError(scheme.bits, scheme.symmetric)
    kinds = {"minmax": MinMax, "avg_minmax": AverageMinMax, "percentile": Percentile, "token_wise": TokenWise}
    return kinds[scheme.observer]()


@dataclasses.dataclass
class Ranges:
    """What calibration learned of each activation, by value name."""

    observers: dict[str, Any]
    energies: dict[str, ChannelEnergy]

    def affine(self, name: str, scheme: ActivationScheme, alpha: float = 1.0) -> Affine:
        """Scale and zero point of an activation; ``alpha`` is the token quantile of the token-wise observer."""
        observer = self.observers[name]
        if isinstance(observer, ChannelRange):
            return _grouped(observer, scheme)
        lo, hi = observer.clipped(alpha) if isinstance(observer, TokenWise) else observer.range()
        return affine_from_range(np.float32(lo), np.float32(hi), scheme.bits, scheme.symmetric, signed=False)

    def energy(self, name: str) -> np.ndarray | None:
        collector = self.energies.get(name)
        return None if collector is None else collector.mean


def calibrate(
    ctx: Context,
    model: ir.Model,
    static: dict[str, ActivationScheme],
    energy: Sequence[str],
    samples: Iterable[Any] | None = None,
) -> Ranges:
    """Stream the samples once: an observer for each name of ``static``, input energies for each of ``energy``."""
    found = Ranges({n: make_observer(s) for n, s in static.items()}, {n: ChannelEnergy() for n in energy})
    collectors: dict[str, list[Any]] = {}
    for table in (found.observers, found.energies):
        for name, collector in table.items():
            collectors.setdefault(name, []).append(collector)
    observe(ctx, model, collectors, samples)
    return found


def outlier_columns(observer: Any, threshold: float) -> np.ndarray:
    """Channels that ever reach ``threshold`` in magnitude (LLM.int8, arXiv 2208.07339): indices."""
    return np.flatnonzero(observer.absmax >= threshold)


def _grouped(seen: ChannelRange, scheme: ActivationScheme) -> Affine:
    """One range for each group of channels of like range (PEG, arXiv 2109.12948), spread over the channels."""
    assert seen.lo is not None and seen.hi is not None
    lo, hi = seen.lo.copy(), seen.hi.copy()
    if scheme.outlier_threshold is not None:
        kept = seen.absmax < scheme.outlier_threshold
        lo[~kept], hi[~kept] = lo[kept].min(initial=0), hi[kept].max(initial=0)
    if scheme.granularity == "per_tensor":
        return affine_from_range(lo.min(), hi.max(), scheme.bits, scheme.symmetric, signed=False)
    for members in np.array_split(np.argsort(hi - lo, kind="stable"), scheme.groups):
        lo[members], hi[members] = lo[members].min(initial=0), hi[members].max(initial=0)
    return affine_from_range(lo, hi, scheme.bits, scheme.symmetric, signed=False)
