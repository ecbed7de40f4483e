"""SmoothQuant: share the difficulty of each channel between activation and weight by one exponent.

rewrite:  linear(norm(x), W, b)  ->  linear(norm(x) / s, W * s, b)
          s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), with W_j the rows j of all linears that read x
needs:    per-channel ranges of norm(x); W constant; every reader a linear, or one that can get x * s
ensures:  equal to 1e-5; with ``search``, never worse on its own objective than leaving the site alone
source:   arXiv 2211.10438, Eq. 4
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.calibration.objective import Objective
from qcompile.calibration.search import Found, objectives, search
from qcompile.calibration.transform import Mode, Ranges, Transform
from qcompile.graph.sites import Site
from qcompile.pipeline import Context, check_range

FLOOR = 1e-5  # of both maxima: a dead channel or a zero row would give 0 or infinity
ALPHAS = np.linspace(0.3, 0.9, 13)


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Transform):
    """Options:

    alpha: share of the difficulty that the weight takes, 0 to 1, at all sites
    search: take the best of 0.3 .. 0.9 at each site instead
    norm: transform what norms feed
    v_o: transform between values and the attention's output projection
    up_down: transform between a feed-forward's up and down projections
    mode: fold into producers, insert nodes, or auto: insert behind norms that cannot fold
    tokens: tokens that the search looks at, about
    """

    name: ClassVar[str] = "smoothquant"
    parameter: ClassVar[str] = "alpha"

    alpha: float = 0.5
    search: bool = False
    norm: bool = True
    v_o: bool = False
    up_down: bool = False
    mode: Mode = "auto"
    tokens: int = 512

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "alpha", hint="0.5 shares alike; search=1 finds one for each site")
        check_range(self, 1, math.inf, "tokens")

    def choose(
        self, model: ir.Model, ctx: Context, sites: Sequence[Site], ranges: Sequence[Ranges]
    ) -> Iterator[tuple[Site, Found]]:
        if not self.search:
            for site, (lo, hi) in zip(sites, ranges, strict=True):
                scale = smoothing(_reach(lo, hi), _weight_reach(site), self.alpha)
                yield site, Found(scale, np.zeros_like(scale), self.alpha)
            return
        targets = objectives(ctx, model, sites, self.tokens)
        for (site, objective), (lo, hi) in zip(targets, ranges, strict=True):
            yield site, self._best(site, objective, _reach(lo, hi))

    def _best(self, site: Site, objective: Objective, reach: np.ndarray) -> Found:
        weights = _weight_reach(site)
        rows = site.expand if site.expand is not None else np.arange(reach.size)
        zero = np.zeros_like(reach)

        def transform(alpha: float) -> tuple[np.ndarray, np.ndarray]:
            return smoothing(reach, weights, alpha), zero

        def loss(alpha: float, scale: np.ndarray, shift: np.ndarray) -> float:
            return objective.loss(scale[rows], shift[rows])

        baseline = objective.loss(np.ones(rows.size, np.float32), zero[rows])
        return search(ALPHAS.tolist(), transform, loss, baseline)


def smoothing(activations: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """The scale of each channel from the absolute maxima (C,) of activations and weights."""
    a = np.maximum(activations, FLOOR).astype(np.float64) ** alpha
    w = np.maximum(weights, FLOOR).astype(np.float64) ** (1 - alpha)
    return np.asarray(np.maximum(a / w, FLOOR), np.float32)


def _reach(lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    reach: np.ndarray = np.maximum(np.abs(lo), np.abs(hi))
    return reach


def _weight_reach(site: Site) -> np.ndarray:
    """max|W_j| over the rows of all readers, experts included, in the producer's channels."""
    readers = (*site.linears, *site.experts)
    rows = np.max([np.abs(r.w).max(axis=-1).reshape(-1, r.rows).max(axis=0) for r in readers], axis=0)
    if site.expand is None:
        return np.asarray(rows)
    widest = np.zeros(site.channels, rows.dtype)
    np.maximum.at(widest, site.expand, rows)
    return widest
