"""Token clip: cut the few largest values of every token, where few bits then serve the others better.

rewrite:  linear(x, W, b)  ->  linear(clip(x, r min(x), r max(x)), W, b), minimum and maximum of each token, r <= 1
needs:    activations quantised token by token with fewer than 6 bits; a few samples; after transforms, before solvers
ensures:  r is 1, and no node is added, where the quantised linears have no smaller error with any other r
source:   a fixed share of each token's range: QuaRot (arXiv 2404.00456), section 4; r for each place by search
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.calibration.objective import Objective
from qcompile.calibration.search import objectives
from qcompile.graph.edits import naming
from qcompile.graph.functions import is_op
from qcompile.graph.linears import Linear, find_linears
from qcompile.graph.provenance import original_name
from qcompile.graph.qdq import clip_tokens
from qcompile.graph.sites import Site
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Form, Pass, check_range
from qcompile.quant import numerics
from qcompile.quant.numerics import CLIP_BELOW_BITS
from qcompile.quant.schemes import ActivationScheme

STEP, LEAST = 0.05, 0.6  # between the shares that are tried, and the smallest one


@dataclasses.dataclass(frozen=True)
class TokenClip(Pass):
    """Options:

    reach: share of every token's range that is kept; none: searched for each place
    tokens: tokens that the search looks at, about
    """

    name: ClassVar[str] = "token_clip"
    preserves: ClassVar[Preserves] = "approximation"
    reads: ClassVar[tuple[Form, ...]] = ("canonical",)

    reach: float | None = None
    tokens: int = 512

    def __post_init__(self) -> None:
        check_range(self, 0.1, 1, "reach")
        check_range(self, 1, math.inf, "tokens")

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Returns how many values are cut."""
        places = _places(model, ctx)
        count = 0
        for site, objective in objectives(ctx, model, places, self.tokens, plain=True):
            reach, before, after = self._choose(objective)
            if reach == 1:
                why = "no share of its tokens' ranges has a smaller error than all of it"
                ctx.ledger.skip(site.name, why, original_name(site.producer))
                continue
            readers = [(linear.node, 0) for linear in site.linears]
            with naming(model):
                clip_tokens(model, site.tensor, readers, reach)
            ctx.ledger.record(site.name, reach=reach, linears=len(readers), loss_before=before, loss_after=after)
            count += 1
        return count

    def _choose(self, objective: Objective) -> tuple[float, float, float]:
        """The share with the smallest error, the error with all of the range, and that with the share.

        From 1 down as long as the error falls: it has one minimum, between rounding and cutting off.
        """
        best, before = 1.0, _loss(objective, 1.0)
        if self.reach is not None:
            return self.reach, before, _loss(objective, self.reach)
        after = before
        for step in range(1, round((1 - LEAST) / STEP) + 1):
            reach = round(1 - STEP * step, 6)
            loss = _loss(objective, reach)
            if not loss < after:
                break
            best, after = reach, loss
        return best, before, after


def _loss(objective: Objective, reach: float) -> float:
    return objective.turned_loss(functools.partial(numerics.clip_tokens, reach=reach), _same)


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _places(model: ir.Model, ctx: Context) -> list[Site]:
    """The values that linears read and that are to have few bits for each token; the others are left with a reason."""
    found: dict[int, list[Linear]] = {}
    for linear in find_linears(model.graph):
        reason = _obstacle(linear, ctx)
        if reason:
            ctx.ledger.skip(linear.name, reason, original_name(linear.node))
        else:
            found.setdefault(id(linear.x), []).append(linear)
    return [
        Site("norm", readers[0].name, readers[0].x, readers[0].x.producer() or readers[0].node, tuple(readers))
        for readers in found.values()
    ]


def _obstacle(linear: Linear, ctx: Context) -> str:
    rule = ctx.recipe.for_linear(linear)
    scheme: ActivationScheme | None = None if rule is None else rule.activations
    if scheme is None:
        return "the recipe keeps its input float"
    if not scheme.dynamic:
        return "its input has one range for all tokens, which quantise chooses"
    if scheme.bits >= CLIP_BELOW_BITS:
        return f"with {scheme.bits} bits a cut loses what it gains"
    return "its input is cut already" if is_op(linear.x.producer(), "ClipTokens") else ""
