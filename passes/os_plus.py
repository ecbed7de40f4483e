"""Outlier Suppression+: move channel-wise shift and scale from activations into weights.

rewrite:  linear(norm(x), W, b)  ->  linear((norm(x) - z) / s, W * s, b + W @ z)
          z_j = (max_j + min_j) / 2,  s_j = max(1, max|x_j - z_j| / t), one threshold t for each site by search
needs:    per-channel ranges of norm(x); W constant; every reader a linear, or one that can get x * s + z
ensures:  equal to 1e-5; never worse on its own objective than leaving the site alone; no node is added where the
          norm has a bias and no reader but linears
source:   arXiv 2304.09145, Eq. 1-8, Algorithm 1
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile.calibration.objective import Objective
from qcompile.calibration.search import Found, channel_ranges, objectives, search, threshold_grid
from qcompile.graph.fold import fold, insert
from qcompile.graph.functions import is_op
from qcompile.graph.provenance import original_name
from qcompile.graph.sites import Site, describe, find_sites
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Pass


@dataclasses.dataclass(frozen=True)
class OsPlus(Pass):
    """Options: ``shift`` (auto: where it folds for free), sites to use, search points, how to apply."""

    name: ClassVar[str] = "os_plus"
    preserves: ClassVar[Preserves] = "function"

    shift: Literal["auto", "on", "off"] = "auto"
    norm: bool = True
    v_o: bool = True
    up_down: bool = True
    mode: Literal["fold", "insert", "auto"] = "auto"
    objective: Literal["auto", "linear"] = "auto"
    points: int = 40
    refine: int = 8
    tokens: int = 512
    t_min: float = 0.1

    def run(self, model: ir.Model, ctx: Context) -> int:
        sites = [site for site in find_sites(model) if self._wanted(site) and self._legal(site, ctx)]
        ranges = dict(zip(map(id, sites), channel_ranges(ctx, model, sites), strict=True)) if sites else {}
        # sources before norms: folding v_o and up_down changes the weights that the norm's search quantises
        sites.sort(key=lambda site: site.kind == "norm")
        for site, objective in objectives(ctx, model, sites, self.tokens, plain=self.objective == "linear"):
            lo, hi = ranges[id(site)]
            self._apply(model, site, self._search(site, objective, lo, hi), ctx, (lo, hi))
        return len(sites)

    def _wanted(self, site: Site) -> bool:
        return {"norm": self.norm, "v_o": self.v_o, "up_down": self.up_down, "q_k": False}[site.kind]

    def _legal(self, site: Site, ctx: Context) -> bool:
        rule = ctx.recipe.rule("linear", site.linears[0].name)
        reason = site.reason if self.mode == "fold" or site.source is not None else ""
        if rule is None or rule.activations is None:
            reason = "activations stay float in this recipe, so nothing is gained"
        if reason and site.reason and self.mode != "fold" and site.kind == "norm":
            reason = "" if self._insertable(site) else site.reason
        if reason:
            ctx.ledger.skip(describe(site), reason, original_name(site.producer))
        return not reason

    def _insertable(self, site: Site) -> bool:
        return len({id(linear.x) for linear in site.linears}) == 1

    def _shifts(self, site: Site) -> bool:
        if site.kind == "up_down" or self.shift == "off":
            return False
        free = is_op(site.producer, "LayerNormalization") or site.kind == "v_o" and _has_bias(site)
        return free or self.shift == "on"

    def _search(self, site: Site, objective: Objective, lo: np.ndarray, hi: np.ndarray) -> Found:
        centre = (hi + lo) / 2 if self._shifts(site) else np.zeros_like(hi)
        reach = np.maximum(hi - centre, centre - lo)
        rows = site.expand if site.expand is not None else np.arange(reach.size)

        def transform(t: float) -> tuple[np.ndarray, np.ndarray]:
            return np.maximum(1.0, reach / np.float32(t)), centre

        def loss(t: float, scale: np.ndarray, shift: np.ndarray) -> float:
            return objective.loss(scale[rows], shift[rows], t)

        zero, one = np.zeros_like(reach), np.ones_like(reach)
        baseline = objective.loss(one[rows], zero[rows])
        top = float(reach.max())
        floor = max(min(self.t_min, top), float(np.median(reach)) * 0.25, 1e-6)
        return search(threshold_grid(top, floor, self.points), transform, loss, baseline, self.refine)

    def _apply(self, model: ir.Model, site: Site, found: Found, ctx: Context, ranges: tuple[np.ndarray, np.ndarray]) -> None:
        scaled = int((found.scale > 1).sum())
        if not scaled and not found.shift.any():
            ctx.ledger.skip(describe(site), "no threshold beats leaving it alone", original_name(site.producer))
            return
        inserting = self.mode == "insert" or bool(site.reason)
        nodes = (insert if inserting else fold)(model, site, found.scale, found.shift, ctx.workspace)
        lo, hi = ranges
        ctx.ledger.record(
            describe(site), threshold=found.parameter, channels_scaled=scaled, largest_scale=float(found.scale.max()),
            shifted=bool(found.shift.any()), loss_before=found.baseline, loss_after=found.loss, nodes_added=nodes,
            range_before=float(max(hi.max(), -lo.min())),
            range_after=float(np.maximum(np.abs(hi - found.shift), np.abs(lo - found.shift)).__truediv__(found.scale).max()),
        )  # fmt: skip
        facts = ctx.ledger.current.facts
        facts.setdefault("search", {})[describe(site)] = {
            "t": [t for t, _ in found.curve], "loss": [v for _, v in found.curve], "best": found.parameter,
        }  # fmt: skip
        facts.setdefault("channel_ranges", {})[describe(site)] = {
            "before": [lo.tolist(), hi.tolist()],
            "after": [((lo - found.shift) / found.scale).tolist(), ((hi - found.shift) / found.scale).tolist()],
        }


def _has_bias(site: Site) -> bool:
    return site.source is not None and site.source.add is not None
