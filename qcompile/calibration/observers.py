"""Streaming observers: fixed memory whatever the number of samples.

Every observer sees the real (unmasked) rows of one sequence at a time, (tokens, channels) float32, and gives
a range ``(lo, hi)`` that contains zero.
Sources: token-wise clipping, Outlier Suppression (arXiv 2209.13325) section 4.2; the sketch is a histogram
with bins of constant relative width (DDSketch, arXiv 1908.10693).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from qcompile.errors import UserError
from qcompile.graph.provenance import original_name
from qcompile.pipeline import Context
from qcompile.quant.numerics import affine_from_range

Range = tuple[float, float]


class Collector(Protocol):
    """Anything that is fed the real rows of a value, sequence by sequence."""

    def update(self, rows: np.ndarray) -> None:
        """Take in ``rows`` (tokens, channels) float32, which may be empty."""


class LogHistogram:
    """Counts of signed values in bins whose width is ``growth - 1`` of their magnitude."""

    SMALLEST, LARGEST = 1e-8, 1e9

    def __init__(self, growth: float = 1.02) -> None:
        self._log_growth = float(np.log(growth))
        self._offset = int(np.floor(np.log(self.SMALLEST) / self._log_growth))
        top = int(np.ceil(np.log(self.LARGEST) / self._log_growth))
        self._size = top - self._offset + 1
        self.counts = np.zeros(2 * self._size + 1, np.int64)  # negatives (largest first), zero, positives

    def update(self, values: np.ndarray) -> None:
        flat = values.reshape(-1)
        magnitude = np.abs(flat)
        nonzero = magnitude >= self.SMALLEST
        self.counts[self._size] += flat.size - int(np.count_nonzero(nonzero))
        picked = flat[nonzero]
        bins = np.floor(np.log(magnitude[nonzero]) / self._log_growth).astype(np.int64) - self._offset
        np.clip(bins, 0, self._size - 1, out=bins)
        signed = np.where(picked > 0, self._size + 1 + bins, self._size - 1 - bins)
        self.counts += np.bincount(signed, minlength=self.counts.size)

    @property
    def centres(self) -> np.ndarray:
        """The value that stands for each bin: (bins,), ascending."""
        steps = np.arange(self._size) + self._offset
        positive = np.exp((steps + 0.5) * self._log_growth)
        return np.concatenate([-positive[::-1], [0.0], positive])

    def quantile(self, q: float) -> float:
        """The value below which a share ``q`` of all values lies, to the relative width of a bin."""
        total = int(self.counts.sum())
        if total == 0:
            return 0.0
        rank = min(max(q * (total - 1), 0.0), total - 1.0)
        index = int(np.searchsorted(np.cumsum(self.counts), rank, side="right"))
        return float(self.centres[min(index, self.counts.size - 1)])


class MinMax:
    """Smallest and largest value."""

    def __init__(self) -> None:
        self.lo, self.hi = np.inf, -np.inf

    def update(self, rows: np.ndarray) -> None:
        if rows.size:
            self.lo, self.hi = min(self.lo, float(rows.min())), max(self.hi, float(rows.max()))

    def range(self) -> Range:
        return (min(self.lo, 0.0), max(self.hi, 0.0)) if self.lo <= self.hi else (0.0, 0.0)


class AverageMinMax:
    """Mean over sequences of each one's extremes."""

    def __init__(self) -> None:
        self._lo = self._hi = 0.0
        self._count = 0

    def update(self, rows: np.ndarray) -> None:
        if rows.size:
            self._lo, self._hi, self._count = (
                self._lo + float(rows.min()),
                self._hi + float(rows.max()),
                self._count + 1,
            )

    def range(self) -> Range:
        n = max(self._count, 1)
        return min(self._lo / n, 0.0), max(self._hi / n, 0.0)


class Percentile(MinMax):
    """The central share ``keep`` of all values."""

    def __init__(self, keep: float = 0.9999) -> None:
        super().__init__()
        self._keep, self._sketch = keep, LogHistogram()

    def update(self, rows: np.ndarray) -> None:
        super().update(rows)
        self._sketch.update(rows)

    def range(self) -> Range:
        lo, hi = super().range()
        tail = (1 - self._keep) / 2
        return max(lo, min(self._sketch.quantile(tail), 0.0)), min(hi, max(self._sketch.quantile(1 - tail), 0.0))


class MeanSquaredError(MinMax):
    """The range whose codes have the smallest expected squared error."""

    SHRINKS = np.geomspace(1.0, 0.02, 80)

    def __init__(self, bits: int, symmetric: bool) -> None:
        super().__init__()
        self._bits, self._symmetric, self._sketch = bits, symmetric, LogHistogram()

    def update(self, rows: np.ndarray) -> None:
        super().update(rows)
        self._sketch.update(rows)

    def range(self) -> Range:
        lo, hi = super().range()
        candidates = [(max(lo, -limit), min(hi, limit)) for limit in max(-lo, hi) * self.SHRINKS]
        return min(candidates, key=lambda r: self._error(*r))

    def _error(self, lo: float, hi: float) -> float:
        if lo == hi:
            return float("inf")
        affine = affine_from_range(lo, hi, self._bits, self._symmetric, signed=False)
        step, x = float(affine.scale), self._sketch.centres
        kept = np.clip(x, lo, hi)
        rounding = np.minimum(step * step / 12, kept * kept)  # finer than a step: the value itself is lost
        return float(self._sketch.counts @ ((x - kept) ** 2 + rounding))


class TokenWise(MinMax):
    """Quantiles over tokens of each token's largest and smallest value; ``alpha`` 1 is min-max."""

    def __init__(self) -> None:
        super().__init__()
        self._top, self._bottom = LogHistogram(1.002), LogHistogram(1.002)

    def update(self, rows: np.ndarray) -> None:
        top, bottom = rows.max(axis=-1), rows.min(axis=-1)
        super().update(np.concatenate([top, bottom]))
        self._top.update(top)
        self._bottom.update(bottom)

    def clipped(self, alpha: float) -> Range:
        """The range that the tokens' extremes stay in with share ``alpha``."""
        lo, hi = self.range()
        if alpha >= 1.0:
            return lo, hi
        return max(lo, min(self._bottom.quantile(1 - alpha), 0.0)), min(hi, max(self._top.quantile(alpha), 0.0))


class ChannelRange:
    """Smallest and largest value of every channel: (C,) each."""

    def __init__(self) -> None:
        self.lo: np.ndarray | None = None
        self.hi: np.ndarray | None = None

    def update(self, rows: np.ndarray) -> None:
        if not rows.size:
            return
        lo, hi = rows.min(axis=0), rows.max(axis=0)
        self.lo = lo if self.lo is None else np.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else np.maximum(self.hi, hi)

    @property
    def absmax(self) -> np.ndarray:
        """The largest magnitude of every channel: (C,)."""
        assert self.lo is not None and self.hi is not None
        reach: np.ndarray = np.maximum(np.abs(self.lo), np.abs(self.hi))
        return reach


# --------------------------------------------------------------------------- feeding them


def sequences(value: np.ndarray, mask: np.ndarray | None) -> Iterator[np.ndarray]:
    """The real rows (tokens, channels) of each sequence of a value of the graph.

    ``mask`` is (batch, seq), True where a token is real. Values are (batch, seq, C), (batch * seq, C) or
    (batch, heads, seq, C); anything else is handed over whole.
    """
    value = np.asarray(value, np.float32)
    cube = None if mask is None else by_sequence(value, mask.shape)
    if mask is None or cube is None:
        yield as_rows(value)
        return
    for rows, real in zip(cube, mask, strict=True):
        yield rows[real.astype(bool)]


def by_sequence(value: np.ndarray, layout: tuple[int, ...] | None) -> np.ndarray | None:
    """``value`` as (batch, seq, C), with (batch, seq) being ``layout`` where it is known; None when it is not so."""
    if layout is not None and value.ndim == 4 and (value.shape[0], value.shape[2]) == layout:
        value = value.transpose(0, 2, 1, 3).reshape(*layout, -1)
    elif layout is not None and value.ndim == 2 and value.shape[0] == int(np.prod(layout)):
        value = value.reshape(*layout, -1)
    return value if value.ndim == 3 and (layout is None or value.shape[:2] == layout) else None


def as_rows(value: np.ndarray) -> np.ndarray:
    """(.., C) -> (tokens, C); a number is one token with one channel."""
    return value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)


def observe(
    ctx: Context,
    model: ir.Model,
    collectors: Mapping[str, Sequence[Collector]],
    samples: Iterable[Any] | None = None,
    label: str = "calibrating",
) -> None:
    """Stream the samples through ``model`` and feed every named value to its collectors.

    Raises UserError where a value is not finite at a real token, or where no real token reaches it.
    """
    if not collectors:
        return
    seen = dict.fromkeys(collectors, 0)
    for sample, values in ctx.runner.stream(
        model, ctx.samples if samples is None else samples, list(collectors), label
    ):
        for name, found in collectors.items():
            for rows in sequences(values[name], sample.mask):
                if not np.isfinite(rows).all():
                    raise not_finite(model, name, rows)
                seen[name] += rows.size
                for collector in found:
                    collector.update(rows)
    for name, count in seen.items():
        if not count:
            raise unreached(model, name)


def unreached(model: ir.Model, name: str) -> UserError:
    """That no real token comes to the value ``name``."""
    return UserError(
        f"no calibration sample reaches '{_shown(model, name)}', so it has no range",
        hint="give --calib at least one sample with an unmasked token",
    )


def not_finite(model: ir.Model, name: str, rows: np.ndarray) -> UserError:
    """That ``rows`` of the value ``name`` hold NaN or infinities."""
    kind = "NaN" if np.isnan(rows).any() else "infinities"
    return UserError(
        f"the activation '{_shown(model, name)}' holds {kind} on a calibration sample",
        hint="the float model overflows on that sample: check the data, or leave the sample out",
    )


def _shown(model: ir.Model, name: str) -> str:
    """The value's name in the user's model."""
    made = (value for node in model.graph for value in node.outputs if value.name == name)
    value = next(made, None)
    return name if value is None else original_name(value)
