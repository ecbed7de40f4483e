"""How far two sets of outputs lie apart: the figures of a Proof."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from qcompile.ledger import Proof

LOST_DB = -200.0  # NaN came out, or something came of nothing
VALUES = 1 << 20  # compared at a time, so that a large vocabulary costs no memory


@dataclasses.dataclass
class Difference:
    """Running sums over pairs of arrays: what a Proof is made of. NaN where only one side is NaN."""

    max_abs: float = 0.0
    peak: float = 0.0
    error: float = 0.0
    signal: float = 0.0

    def add(self, before: np.ndarray, after: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Take in one pair of equal shape; ``mask`` (bool) is on their leading axes."""
        if mask is not None and mask.shape == before.shape[: mask.ndim]:
            rows = np.flatnonzero(mask.reshape(-1))
            before = before.reshape(mask.size, -1)
            after = after.reshape(mask.size, -1)
        else:
            before, after = (x.reshape(x.shape[0] if x.ndim else 1, -1) for x in (before, after))
            rows = np.arange(before.shape[0])
        count = max(1, VALUES // max(1, before.shape[1]))
        for start in range(0, len(rows), count):
            some = rows[start : start + count]
            self._add_rows(before[some].astype(np.float64), after[some].astype(np.float64))

    def _add_rows(self, before: np.ndarray, after: np.ndarray) -> None:
        with np.errstate(invalid="ignore"):
            gap = np.abs(after - before)
        gap[(before == after) | (np.isnan(before) & np.isnan(after))] = 0.0  # equal infinities included
        finite = np.where(np.isfinite(before), before, 0.0)
        self.max_abs = _largest(self.max_abs, gap)
        self.peak = _largest(self.peak, np.abs(finite))
        self.error += float(np.square(gap).sum())
        self.signal += float(np.square(finite).sum())

    @property
    def relative(self) -> float:
        """max|after - before| / max|before|; infinite where something became of nothing."""
        if self.max_abs == 0.0:
            return 0.0
        return self.max_abs / self.peak if self.peak else math.inf

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / error) in dB; infinite where nothing differs, LOST_DB where nothing is left."""
        if self.error == 0.0:
            return math.inf
        if not math.isfinite(self.error) or self.signal == 0.0:
            return LOST_DB
        return 10.0 * math.log10(self.signal / self.error)


def _largest(held: float, values: np.ndarray) -> float:
    if values.size == 0:
        return held
    return float(np.maximum(held, values.max()))  # np.maximum keeps NaN, max() would drop it


def proof_of(differences: Iterable[Difference], samples: int, tolerance: float | None) -> Proof:
    """One Proof of several outputs: each figure is that of the worst one."""
    found = list(differences)
    return Proof(
        samples=samples,
        max_abs=max((_nan_high(d.max_abs) for d in found), default=0.0),
        relative=max((_nan_high(d.relative) for d in found), default=0.0),
        sqnr_db=min((d.sqnr_db for d in found), default=math.inf),
        tolerance=tolerance,
    )


def _nan_high(value: float) -> float:
    return math.inf if math.isnan(value) else value
