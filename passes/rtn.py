"""Round to nearest: search the clip of every column or group of a weight, and round.

rewrite:  linear(x, W, b)  ->  linear(x, V, b), V the values of codes that quantise then writes as they are
          each end of a range is searched, for the least sum of e_j^2 (W_j - V_j)^2, e_j the energy of input j
needs:    calibration samples; W constant and no embedding's table; a scheme with clip = mse (else: its whole range)
ensures:  no column has a larger error, so weighted, than with its whole range; codes in the program equal the ones here
source:   clip search of AWQ, arXiv 2306.00978
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.calibration.ranges import calibrate
from qcompile.calibration.solvable import hand_in, solvable
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Form, Pass
from qcompile.progress import track
from qcompile.quant.clips import search_clips
from qcompile.quant.schemes import WeightScheme


@dataclasses.dataclass(frozen=True)
class Rtn(Pass):
    """Options:

    energy: weight the error of each row by the energy of its input
    """

    name: ClassVar[str] = "rtn"
    preserves: ClassVar[Preserves] = "approximation"
    reads: ClassVar[tuple[Form, ...]] = ("canonical",)

    energy: bool = True

    def run(self, model: ir.Model, ctx: Context) -> int:
        found = solvable(ctx, model)
        names = list(dict.fromkeys(str(linear.x.name) for linear, _ in found)) if self.energy else []
        ranges = calibrate(ctx, model, {}, names)
        done: set[int] = set()
        for linear, scheme in track(found, "rounding"):
            if id(linear.weight) in done:  # shared by several linears
                continue
            done.add(id(linear.weight))
            w, energy = np.asarray(linear.w, np.float32), ranges.energy(str(linear.x.name))
            levels = search_clips(w, scheme, energy)
            weight = levels.packed(levels.nearest(w), scheme)
            before = _error(w, _whole_range(w, scheme), energy)
            hand_in(ctx, linear, weight, scheme, before, _error(w, weight.dequantized(), energy))
        return len(done)


def _whole_range(w: np.ndarray, scheme: WeightScheme) -> np.ndarray:
    levels = search_clips(w, scheme.model_copy(update={"clip": "minmax"}), None)
    return levels.values(levels.nearest(w))


def _error(w: np.ndarray, rounded: np.ndarray, energy: np.ndarray | None) -> float:
    """Squared error as a share of the weight's own square, rows weighted by ``energy`` (K,)."""
    weights = np.ones(len(w), np.float32) if energy is None else energy
    lost, size = (float((np.square(a).sum(axis=1) * weights).sum()) for a in (w - rounded, w))
    return lost / size if size else 0.0
