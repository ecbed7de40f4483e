"""What the equivalent transforms share: where one may stand, how it is applied, what is recorded."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile.calibration.search import Found, channel_ranges
from qcompile.graph.fold import fold, insert
from qcompile.graph.provenance import original_name
from qcompile.graph.sites import Site, describe, find_sites
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Form, Pass

Mode = Literal["fold", "insert", "auto"]
Ranges = tuple[np.ndarray, np.ndarray]  # (lo, hi) of each channel of the producer


@dataclasses.dataclass(frozen=True)
class Transform(Pass):
    """A pass that moves a shift and a scale of each channel from activations into weights."""

    preserves: ClassVar[Preserves] = "function"
    reads: ClassVar[tuple[Form, ...]] = ("canonical",)
    parameter: ClassVar[str] = "parameter"  # what ``Found.parameter`` is called in the ledger

    @abc.abstractmethod
    def choose(
        self, model: ir.Model, ctx: Context, sites: Sequence[Site], ranges: Sequence[Ranges]
    ) -> Iterator[tuple[Site, Found]]:
        """The transform of each site; the one before is applied when the next is asked for."""

    def kinds(self) -> Sequence[str]:
        """The kinds of sites to use: those whose option is on; a pass without such options uses norms."""
        return [kind for kind in ("norm", "v_o", "up_down") if getattr(self, kind, kind == "norm")]

    def how(self) -> Mode:
        """The option ``mode``: ``fold`` into producers (where there is no option), or ``insert`` nodes; ``auto``
        inserts behind norms that cannot fold."""
        mode: Mode = getattr(self, "mode", "fold")
        return mode

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Choose and apply; returns how many sites were changed. The others are left with a reason."""
        sites = [site for site in find_sites(model) if site.kind in self.kinds() and self._legal(site, ctx)]
        if not sites:
            return 0
        # sources before norms: folding v_o and up_down changes the weights that the norm's search quantises
        sites.sort(key=lambda site: site.kind == "norm")
        ranges = channel_ranges(ctx, model, sites)
        seen = dict(zip(map(id, sites), ranges, strict=True))
        chosen = self.choose(model, ctx, sites, ranges)
        return sum(self._apply(model, site, found, ctx, seen[id(site)]) for site, found in chosen)

    def _legal(self, site: Site, ctx: Context) -> bool:
        rule = ctx.recipe.for_linear(site.linears[0])
        reason = obstacle(site, self.how())
        if rule is None or rule.activations is None:
            reason = "activations stay float in this recipe, so nothing is gained"
        if reason:
            ctx.ledger.skip(describe(site), reason, original_name(site.producer))
        return not reason

    def _apply(self, model: ir.Model, site: Site, found: Found, ctx: Context, ranges: Ranges) -> bool:
        if (found.scale == 1).all() and not found.shift.any():
            why = f"no {self.parameter} beats leaving it alone"
            ctx.ledger.skip(describe(site), why, original_name(site.producer))
            return False
        inserting = self.how() == "insert" or bool(site.reason)
        nodes = (insert if inserting else fold)(model, site, found.scale, found.shift, ctx.workspace)
        self._record(ctx, site, found, ranges, nodes)
        return True

    def _record(self, ctx: Context, site: Site, found: Found, ranges: Ranges, nodes: int) -> None:
        lo, hi = ((bound - found.shift) / found.scale for bound in ranges)
        after = np.minimum(lo, hi), np.maximum(lo, hi)  # a scale may be negative
        searched = {
            "rule": found.rule or None, "exponent" if found.rule else self.parameter: found.parameter,
            "loss_before": found.baseline, "loss_after": found.loss,
        }  # fmt: skip
        ctx.ledger.record(
            describe(site), channels_scaled=int((found.scale != 1).sum()), shifted=bool(found.shift.any()),
            largest_scale=float(np.abs(found.scale).max()), nodes_added=nodes,
            range_before=_reach(ranges), range_after=_reach(after),
            **{key: value for key, value in searched.items() if value is not None},
        )  # fmt: skip
        facts, name = ctx.ledger.current.facts, describe(site)
        if found.curve:
            tried, losses = zip(*found.curve, strict=True)
            curve = {"t": list(tried), "loss": list(losses), "best": found.parameter}
            facts.setdefault("search", {})[name] = curve
        facts.setdefault("channel_ranges", {})[name] = {
            "before": [side.tolist() for side in ranges], "after": [side.tolist() for side in after],
        }  # fmt: skip


def obstacle(site: Site, mode: Mode) -> str:
    """Why ``site`` cannot be used in ``mode``; empty when it can."""
    if mode == "fold" or (mode == "auto" and site.source is not None):
        return site.reason
    if mode == "auto" and not site.reason:
        return ""
    if len({id(linear.x) for linear in site.linears}) != 1 or site.experts:
        return site.reason or "its readers see it through different views: nothing can be inserted"
    if any(linear.chosen or linear.transposed for linear in site.linears):
        return site.reason
    return ""


def _reach(ranges: Ranges) -> float:
    lo, hi = ranges
    return float(max(hi.max(), -lo.min()))
