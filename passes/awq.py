"""AWQ: scale up the weights that large inputs read, so that rounding hurts them less.

rewrite:  linear(norm(x), W, b)  ->  linear(norm(x) / s, W * s, b)
          s_j = size_j^a, with size_j the root mean square of x_j over tokens of length one; one a for each site
          by search
needs:    calibration samples; a recipe that quantises the weights of the site's linears
ensures:  equal to 1e-5; never worse on its own objective, which rounds and clips as the recipe says, than leaving the
          site alone; the clips themselves are chosen by rtn, gptq or quantise after it
source:   arXiv 2306.00978
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
from qcompile.calibration.transform import Mode, Ranges, Transform, obstacle
from qcompile.graph.provenance import original_name
from qcompile.graph.sites import Site, describe
from qcompile.pipeline import Context, check_range

LARGEST_LOG = 4.0  # a scale stays within e^-4 .. e^4 of the middle: a channel hardly seen gets no extreme one


@dataclasses.dataclass(frozen=True)
class Awq(Transform):
    """Options:

    norm: transform what norms feed
    v_o: transform between values and the attention's output projection
    up_down: transform between a feed-forward's up and down projections
    mode: fold into producers, insert nodes, or auto: insert behind norms that cannot fold
    points: exponents that the search tries, evenly spaced below 1
    tokens: tokens that the search looks at, about
    """

    name: ClassVar[str] = "awq"
    parameter: ClassVar[str] = "exponent"

    norm: bool = True
    v_o: bool = True
    up_down: bool = True
    mode: Mode = "auto"
    points: int = 10
    tokens: int = 512

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "points", "tokens")

    def _legal(self, site: Site, ctx: Context) -> bool:
        rule = ctx.recipe.for_linear(site.linears[0])
        reason = obstacle(site, self.how())
        if rule is None or rule.weights is None:
            reason = "weights stay float in this recipe, so nothing is gained"
        if reason:
            ctx.ledger.skip(describe(site), reason, original_name(site.producer))
        return not reason

    def choose(
        self, model: ir.Model, ctx: Context, sites: Sequence[Site], ranges: Sequence[Ranges]
    ) -> Iterator[tuple[Site, Found]]:
        for site, objective in objectives(ctx, model, sites, self.tokens):
            rule = ctx.recipe.for_linear(site.linears[0])
            objective.weights = rule.weights if rule is not None else None
            objective.by_energy = True  # with the clip that the program will have
            yield site, self._search(site, objective)

    def _search(self, site: Site, objective: Objective) -> Found:
        rows = site.expand if site.expand is not None else np.arange(site.linears[0].rows)
        zero = np.zeros(rows.size, np.float32)
        size = np.zeros(int(rows.max()) + 1, np.float32)
        np.maximum.at(size, rows, objective.energy(zero))

        def transform(exponent: float) -> tuple[np.ndarray, np.ndarray]:
            return awq_scale(size, exponent), np.zeros_like(size)

        def loss(_: float, scale: np.ndarray, shift: np.ndarray) -> float:
            return objective.loss(scale[rows], shift[rows])

        exponents = np.arange(1, self.points + 1) / (self.points + 1)
        return search(exponents.tolist(), transform, loss, objective.loss(np.ones_like(zero), zero))


def awq_scale(size: np.ndarray, exponent: float) -> np.ndarray:
    """size^exponent around one; a channel that no token uses stays as it is."""
    used = size > 0
    logs = exponent * np.log(np.where(used, size, 1.0))
    if used.any():
        logs -= (logs[used].max() + logs[used].min()) / 2
    return np.where(used, np.exp(np.clip(logs, -LARGEST_LOG, LARGEST_LOG)), 1.0).astype(np.float32)
