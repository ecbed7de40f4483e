"""Outlier Suppression+: move channel-wise shift and scale from activations into weights.

rewrite:  linear(norm(x), W, b)  ->  linear((norm(x) - z) / s, W * s, b + W @ z)
          z_j = (max_j + min_j) / 2,  s_j = max(1, max|x_j - z_j| / t), one t for each site by search
          family=auto: also s_j = size_j^a / |W_j|^(1-a), kept only where it beats every threshold
needs:    per-channel ranges of norm(x); W constant; every reader a linear, or one that can get x * s + z
ensures:  equal to 1e-5; never worse on its own objective than leaving the site alone; no node is added where
          the norm has a bias and no reader but linears (a tied head: one after its embedding)
source:   arXiv 2304.09145, Eq. 1-8, Algorithm 1
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile.calibration.objective import Objective
from qcompile.calibration.search import Found, objectives, power_scale, refine, search, threshold_grid
from qcompile.calibration.transform import Mode, Ranges, Transform
from qcompile.graph.functions import is_op
from qcompile.graph.sites import Site
from qcompile.pipeline import Context, check_range

POWERS = (0.25, 0.4, 0.55, 0.7)  # exponents tried beside the thresholds, around SmoothQuant's 0.5


@dataclasses.dataclass(frozen=True)
class OsPlus(Transform):
    """Options:

    shift: centre every channel; auto: where that folds for free
    norm: transform what norms feed
    v_o: transform between values and the attention's output projection
    up_down: transform between a feed-forward's up and down projections
    mode: fold into producers, insert nodes, or auto: insert behind norms that cannot fold
    objective: what the search measures: the linears alone, or auto: attention and gate where there is one
    points: thresholds that the search tries
    refine: thresholds that each finer round tries around the best one, where no power is better; 0: no finer rounds
    tokens: tokens that the search looks at, about
    t_min: no threshold is smaller
    family: scales that the search tries: thresholds, or auto: also powers as SmoothQuant's
    """

    name: ClassVar[str] = "os_plus"
    parameter: ClassVar[str] = "threshold"

    shift: Literal["auto", "on", "off"] = "auto"
    norm: bool = True
    v_o: bool = True
    up_down: bool = True
    mode: Mode = "auto"
    objective: Literal["auto", "linear"] = "auto"
    points: int = 5
    refine: int = 3
    tokens: int = 512
    t_min: float = 0.1
    family: Literal["threshold", "auto"] = "auto"

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "points", "tokens")
        check_range(self, 0, math.inf, "refine", "t_min")

    def choose(
        self, model: ir.Model, ctx: Context, sites: Sequence[Site], ranges: Sequence[Ranges]
    ) -> Iterator[tuple[Site, Found]]:
        plain = self.objective == "linear"
        targets = objectives(ctx, model, sites, self.tokens, plain=plain)
        for (site, objective), (lo, hi) in zip(targets, ranges, strict=True):
            yield site, self._search(site, objective, lo, hi)

    def _shifts(self, site: Site) -> bool:
        if site.kind == "up_down" or site.experts or self.shift == "off":
            return False
        free = is_op(site.producer, "LayerNormalization") or (site.kind == "v_o" and _has_bias(site))
        return free or self.shift == "on"

    def _search(self, site: Site, objective: Objective, lo: np.ndarray, hi: np.ndarray) -> Found:
        centre = (hi + lo) / 2 if self._shifts(site) else np.zeros_like(hi)
        reach = np.maximum(hi - centre, centre - lo)
        rows = site.expand if site.expand is not None else np.arange(reach.size)

        def threshold(t: float) -> tuple[np.ndarray, np.ndarray]:
            return np.maximum(1.0, reach / np.float32(t)), centre

        def loss(_: float, scale: np.ndarray, shift: np.ndarray) -> float:
            return objective.loss(
                scale[rows], shift[rows], (float(((lo - shift) / scale).min()), float(((hi - shift) / scale).max()))
            )

        zero, one = np.zeros_like(reach), np.ones_like(reach)
        baseline = objective.loss(one[rows], zero[rows])
        top = float(reach.max())
        floor = max(min(self.t_min, top), float(np.median(reach)) * 0.25, 1e-6)
        found = search(threshold_grid(top, floor, self.points).tolist(), threshold, loss, baseline)
        if self.family == "threshold":
            return refine(found, self.refine, threshold, loss)
        size = reach if objective.is_static else _largest(rows, objective.energy(centre[rows]))
        weight = _largest(rows, objective.weight_size)

        def power(exponent: float) -> tuple[np.ndarray, np.ndarray]:
            return power_scale(size, weight, exponent), centre

        assert found.loss is not None
        other = search(POWERS, power, loss, found.loss)
        if other.loss == found.loss:
            return refine(found, self.refine, threshold, loss)
        return dataclasses.replace(other, baseline=baseline, curve=found.curve, rule="power")


def _largest(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Per producer channel the largest of the values of the consumer rows that it feeds."""
    result = np.zeros(int(rows.max()) + 1, np.float32)
    np.maximum.at(result, rows, values)
    return result


def _has_bias(site: Site) -> bool:
    return site.source is not None and site.source.add is not None
