"""Streaming statistics of one activation: its channels, its tokens, and what quantisers lose on it.

Fixed memory whatever the number of samples; padding is never seen. Sources: the outlier analysis of
Outlier Suppression+ (arXiv 2304.09145), LLM.int8 (arXiv 2208.07339) section 4, massive activations
(arXiv 2402.17762).
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np

from qcompile.calibration.observers import ChannelRange, TokenWise, as_rows, by_sequence
from qcompile.quant.numerics import affine_from_range, fake_quantize, fake_quantize_per_token

BITS = (8, 6, 4)
GRANULARITIES = ("per_tensor", "per_token", "per_channel")
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Sequence:
    """The real tokens of one sequence: values (T, C) float32; positions and ids (T,) where they are known.

    A position counts the real tokens, so that 0 is the first of them wherever the padding is.
    """

    rows: np.ndarray
    positions: np.ndarray | None = None
    ids: np.ndarray | None = None


def real_sequences(value: np.ndarray, sample: Any) -> Iterator[Sequence]:
    """The sequences of a value (batch, seq, C), (batch * seq, C) or (batch, heads, seq, C) of the graph.

    Anything else is one sequence whose positions are not known.
    """
    value = np.asarray(value, np.float32)
    ids = _token_ids(sample)
    mask = sample.mask
    layout = next((a.shape for a in (mask, ids) if a is not None), None)
    cube = by_sequence(value, layout)
    if cube is None:
        yield Sequence(as_rows(value))
        return
    for i, rows in enumerate(cube):
        real = np.ones(len(rows), bool) if mask is None else mask[i].astype(bool)
        known = ids[i][real] if ids is not None and ids.shape == cube.shape[:2] else None
        yield Sequence(rows[real], np.arange(int(real.sum())), known)


def _token_ids(sample: Any) -> np.ndarray | None:
    found = [a for name, a in sample.feeds.items() if name.endswith("input_ids") and a.ndim == 2]
    return found[0] if found else None


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """|intersection| / |union|; 1 for two empty sets."""
    union = one | other
    return len(one & other) / len(union) if union else 1.0


class ChannelStatistics:
    """Moments, extremes and signs of every channel (C,), and how steady the largest channels are.

    ``large`` counts the tokens with |x| >= ``threshold``; ``hits`` the sequences where a channel is one of
    the ``top`` largest.
    """

    def __init__(self, top: int, threshold: float) -> None:
        self._top, self._threshold = top, threshold
        self.tokens = self.sequences = 0
        self.fourth = self.third = 0.0
        self._range = ChannelRange()
        self._previous: frozenset[int] | None = None
        self._overlap = 0.0

    def update(self, rows: np.ndarray) -> None:
        """Take in the rows (T, C) of one sequence."""
        if not rows.size:
            return
        if not self.tokens:
            self.total, self.squares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
            self.positive, self.negative, self.large, self.hits = np.zeros((4, rows.shape[1]), np.int64)
        squares, size = np.square(rows), np.abs(rows)
        self._range.update(rows)
        self.tokens += len(rows)
        self.total += rows.sum(axis=0, dtype=np.float64)
        self.squares += squares.sum(axis=0, dtype=np.float64)
        self.third += float(np.vdot(rows, squares))
        self.fourth += float(np.vdot(squares, squares))
        self.positive += np.count_nonzero(rows > 0, axis=0)
        self.negative += np.count_nonzero(rows < 0, axis=0)
        self.large += np.count_nonzero(size >= self._threshold, axis=0)
        self._follow(size.max(axis=0))

    def _follow(self, absmax: np.ndarray) -> None:
        """Compare this sequence's largest channels with those of the one before."""
        largest = frozenset(np.argsort(-absmax, kind="stable")[: self._top].tolist())
        self.hits[list(largest)] += 1
        if self._previous is not None:
            self._overlap += jaccard(largest, self._previous)
        self._previous = largest
        self.sequences += 1

    @property
    def lo(self) -> np.ndarray:
        assert self._range.lo is not None
        return self._range.lo

    @property
    def hi(self) -> np.ndarray:
        assert self._range.hi is not None
        return self._range.hi

    @property
    def absmax(self) -> np.ndarray:
        return self._range.absmax

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.tokens

    @property
    def std(self) -> np.ndarray:
        deviation: np.ndarray = np.sqrt(np.maximum(self.squares / self.tokens - self.mean**2, 0.0))
        return deviation

    @property
    def asymmetry(self) -> np.ndarray:
        """|hi + lo| / (hi - lo): 0 is centred, 1 touches zero, more never crosses it; 0 where hi is lo."""
        width = self.hi - self.lo
        ratio: np.ndarray = np.where(width > TINY, np.abs(self.hi + self.lo) / np.maximum(width, TINY), 0.0)
        return ratio

    @property
    def sign_consistency(self) -> np.ndarray:
        """The share of tokens that have the channel's more frequent sign."""
        return np.maximum(self.positive, self.negative) / self.tokens

    @property
    def steadiness(self) -> float | None:
        """Mean Jaccard index of the ``top`` channels of one sequence and the next; None for one sequence."""
        return self._overlap / (self.sequences - 1) if self.sequences > 1 else None

    @property
    def kurtosis(self) -> float:
        """Fourth central moment over squared variance, of all values together (normal: 3)."""
        n = self.tokens * self.total.size
        m1, m2 = float(self.total.sum()) / n, float(self.squares.sum()) / n
        m3, m4 = self.third / n, self.fourth / n
        variance = m2 - m1**2
        return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2 if variance > TINY else 0.0

    def energy_share(self, share: float = 0.01) -> float:
        """How much of the energy is in the top ``share`` of the channels (one at least)."""
        count = max(1, round(share * self.squares.size))
        total = float(self.squares.sum())
        return float(np.sort(self.squares)[-count:].sum()) / total if total else 0.0


@dataclasses.dataclass(frozen=True, order=True)
class TopToken:
    """One of the largest tokens: its value of largest magnitude, and where that is; position -1: unknown."""

    size: float
    sequence: int
    position: int
    value: float = dataclasses.field(compare=False)
    channel: int = dataclasses.field(compare=False)
    id: int | None = dataclasses.field(compare=False)


class TokenStatistics:
    """Which tokens set the range: extremes of first and other tokens, token quantiles, the largest tokens."""

    def __init__(self, top: int) -> None:
        self._top = top
        self.first, self.rest = ChannelRange(), ChannelRange()
        self._extremes = TokenWise()
        self._heap: list[TopToken] = []
        self._sequences = 0

    def update(self, sequence: Sequence) -> None:
        rows = sequence.rows
        if not rows.size:
            return
        self._extremes.update(rows)
        if sequence.positions is None:
            self.rest.update(rows)
        else:
            is_first = sequence.positions == 0
            self.first.update(rows[is_first])
            self.rest.update(rows[~is_first])
        size = np.maximum(rows.max(axis=1), -rows.min(axis=1))
        for t in np.argsort(-size, kind="stable")[: self._top].tolist():
            self._offer(sequence, t, float(size[t]))
        self._sequences += 1

    def _offer(self, sequence: Sequence, t: int, size: float) -> None:
        if len(self._heap) == self._top and size <= self._heap[0].size:
            return
        channel = int(np.abs(sequence.rows[t]).argmax())
        position = -1 if sequence.positions is None else int(sequence.positions[t])
        known = None if sequence.ids is None else int(sequence.ids[t])
        found = TopToken(size, self._sequences, position, float(sequence.rows[t, channel]), channel, known)
        (heapq.heappushpop if len(self._heap) == self._top else heapq.heappush)(self._heap, found)

    @property
    def largest(self) -> list[TopToken]:
        return sorted(self._heap, reverse=True)

    @property
    def ordinary(self) -> ChannelRange:
        """Channel ranges of all tokens but first ones; of all where every token is a first one."""
        return self.rest if self.rest.lo is not None else self.first

    def share_of_first(self) -> float:
        """The share of the quantiser's range (which holds zero) that only first tokens need."""
        return 1 - _width(*_extent(self.ordinary)) / max(_width(*self._extremes.range()), TINY)

    def share_of_few(self, share: float = 0.01) -> float:
        """The share of the quantiser's range that only the most extreme ``share`` of the tokens need."""
        return 1 - _width(*self._extremes.clipped(1 - share)) / max(_width(*self._extremes.range()), TINY)


def _extent(channels: ChannelRange) -> tuple[float, float]:
    assert channels.lo is not None and channels.hi is not None
    return float(channels.lo.min()), float(channels.hi.max())


def _width(lo: float, hi: float) -> float:
    return max(hi, 0.0) - min(lo, 0.0)


class QuantizerLoss:
    """What static per tensor, dynamic per token and static per channel quantisers lose, at each of ``BITS``.

    ``sqnr``: signal over error, in dB. ``token_sqnr``: the error of each token over its own signal, averaged
    over tokens: a few huge tokens cannot hide that all others are lost.
    """

    def __init__(self, lo: np.ndarray, hi: np.ndarray) -> None:
        self._lo, self._hi = lo, hi
        self._signal, self._tokens = 0.0, 0
        self._error = dict.fromkeys(_cases(), 0.0)
        self._ratio = dict.fromkeys(_cases(), 0.0)

    def update(self, sequence: Sequence) -> None:
        rows = sequence.rows
        energy = np.square(rows).sum(axis=1, dtype=np.float64)
        self._signal += float(energy.sum())
        self._tokens += len(rows)
        for kind, bits in _cases():
            error = np.square(self._quantized(rows, kind, bits) - rows).sum(axis=1, dtype=np.float64)
            self._error[kind, bits] += float(error.sum())
            self._ratio[kind, bits] += float((error / np.maximum(energy, TINY)).sum())

    def _quantized(self, rows: np.ndarray, kind: str, bits: int) -> np.ndarray:
        if kind == "per_token":
            return fake_quantize_per_token(rows, bits, symmetric=False)
        lo, hi = (self._lo, self._hi) if kind == "per_channel" else (self._lo.min(), self._hi.max())
        return fake_quantize(rows, affine_from_range(lo, hi, bits, symmetric=False, signed=False))

    def sqnr(self) -> dict[str, float]:
        """dB by ``per_tensor_8`` and so on."""
        return {f"{k}_{b}": _decibels(self._signal, e) for (k, b), e in self._error.items()}

    def token_sqnr(self) -> dict[str, float]:
        return {f"{k}_{b}": _decibels(self._tokens, r) for (k, b), r in self._ratio.items()}


def _cases() -> list[tuple[str, int]]:
    return [(kind, bits) for kind in GRANULARITIES for bits in BITS]


def _decibels(signal: float, error: float) -> float:
    return float(10 * np.log10(max(signal, TINY) / max(error, TINY * max(signal, 1.0))))
