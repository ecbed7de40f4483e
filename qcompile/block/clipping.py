"""Where the clips of a weight start that are learned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcompile.block.quantisers import WeightClip
from qcompile.graph.linears import Linear
from qcompile.quant.clips import groups_of, search_clips
from qcompile.quant.numerics import code_range, quantize_weight
from qcompile.quant.schemes import WeightScheme

Start = Callable[[Linear, WeightScheme, np.ndarray | None], tuple[np.ndarray, np.ndarray]]


def _searched(linear: Linear, scheme: WeightScheme, energy: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points (G, N) of the searched ends."""
    levels = search_clips(np.asarray(linear.w, np.float32), scheme, energy)
    return levels.scale, levels.zero_point


def _plain(linear: Linear, scheme: WeightScheme, energy: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points (G, N) that quantise chooses when it is left alone."""
    weight = quantize_weight(np.asarray(linear.w, np.float32), scheme, energy)
    return np.atleast_2d(weight.scale), np.atleast_2d(weight.zero_point.astype(np.int32))


STARTS: tuple[Start, ...] = (_plain, _searched)


def started(linear: Linear, scheme: WeightScheme, grid: tuple[np.ndarray, np.ndarray]) -> WeightClip:
    """A clip that starts at the ends of ``grid``: scales and zero points (G, N)."""
    w, rows = np.asarray(linear.w, np.float32), groups_of(linear.rows, scheme)
    scale, zero = grid
    bounds = code_range(scheme.bits, scheme.symmetric, signed=True)
    ends = np.stack([(end - zero) * scale for end in bounds]).astype(np.float64)
    groups = [w[rows == number] for number in range(len(scale))]
    lows, highs = ([reach(group, axis=0) for group in groups] for reach in (np.min, np.max))
    extremes = np.stack([np.minimum(lows, 0), np.maximum(highs, 0)])
    fractions = np.divide(ends, extremes, out=np.ones_like(ends), where=extremes != 0)
    return WeightClip(linear.rows, linear.columns, scheme, fractions)
