"""Quantise: write the recipe's formats into the graph, and hold the accuracy gate.

rewrite:  linear(x, W, b)  ->  linear(DQ(Q(x)), DQ(codes), b), or the per-token function instead of DQ(Q(x)); an x that
          came as DQ(Q(x)), with a range that training learned, stays as it is;
          concat(past, k)  ->  concat(past, the per-token function of k), which the lowering turns into codes; keys
          of few bits around their mean
needs:    a recipe with rules; calibration samples where a range is static
ensures:  codes within the bits of their scheme; constants (masks, tables of positions) are never calibrated as
          activations; with a gate, the fewest activations in higher precision that hold it
source:   ONNX QuantizeLinear-21; token-wise clipping of arXiv 2209.13325
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.calibration.draft import Choice, Draft
from qcompile.calibration.metric import Metric
from qcompile.calibration.samples import first_samples, shortened
from qcompile.calibration.sensitivity import choose_alpha, hold_gate, likely_exceptions, rank
from qcompile.calibration.trial import calibrate_draft
from qcompile.graph.grids import forget_grids
from qcompile.graph.provenance import original_name
from qcompile.graph.qdq import open_clips
from qcompile.graph.sites import find_linears
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Form, Pass, check_range
from qcompile.progress import warn
from qcompile.recipe import Op, Rule

EFFECT_SAMPLES, EFFECT_TOKENS = 8, 256  # what weights and activations do apart is told on so many
NO_CACHE = "the graph has no key/value cache to quantise: none of its outputs is a past input with new tokens behind it"


@dataclasses.dataclass(frozen=True)
class Quantise(Pass):
    """Options:

    alpha: quantile over tokens of each token's extremes, 0 to 1; none: chosen on the model's output
    energy: weight the clip of narrow weights by the energy of their inputs
    gate_samples: samples that --max-drop is measured on
    alpha_samples: samples that alpha is chosen on
    """

    name: ClassVar[str] = "quantise"
    preserves: ClassVar[Preserves] = "approximation"
    reads: ClassVar[tuple[Form, ...]] = ("canonical",)
    makes: ClassVar[Form | None] = "quantised"

    alpha: float | None = None
    energy: bool = True
    gate_samples: int = 4
    alpha_samples: int = 32

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "alpha")
        check_range(self, 1, math.inf, "gate_samples", "alpha_samples")

    def run(self, model: ir.Model, ctx: Context) -> int:
        draft = Draft(model, ctx.recipe, ctx.workspace)
        for site, reason, node in draft.left:
            ctx.ledger.skip(site, reason, node)
        _tell_unmatched(ctx, draft.names())
        if not draft.choice.weights and not draft.choice.caches:
            ctx.ledger.note("nothing to quantise: no linear with a constant weight was found")
            return 0
        calibrate_draft(ctx, draft, energy=self.energy)
        choice, alpha = self._decide(ctx, draft)
        _record_exceptions(ctx, draft)
        self._record(ctx, draft, choice)
        _record_effects(ctx, draft, choice, alpha)
        count = draft.apply(model, choice, alpha)
        ctx.ledger.current.facts["alpha"] = alpha
        return count

    def _decide(self, ctx: Context, draft: Draft) -> tuple[Choice, float]:
        """The schemes and the token quantile; with a gate, precision where the whole model needs it."""
        if ctx.max_drop is None:
            return draft.choice, self._alpha(ctx, draft, draft.choice)
        readers = draft.readers()
        gate = _last(ctx, self.gate_samples)
        metric = Metric(ctx, ctx.exact or draft.model, gate)
        ranking = rank(ctx, draft, metric, gate)
        ctx.ledger.current.facts["sensitivity"] = [
            {"activation": name, "linears": readers.get(name, []), "damage": damage}
            for name, damage in ranking.damage.items()
        ]
        sound = draft.choice.with_activation(likely_exceptions(draft, ranking, ctx.max_drop), readers)
        alpha = self._alpha(ctx, draft, sound, metric.is_perplexity)
        return hold_gate(ctx, draft, ranking, metric, alpha, ctx.max_drop), alpha

    def _alpha(self, ctx: Context, draft: Draft, choice: Choice, causal: bool | None = None) -> float:
        return self.alpha if self.alpha is not None else choose_alpha(ctx, draft, choice, self.alpha_samples, causal)

    def _record(self, ctx: Context, draft: Draft, choice: Choice) -> None:
        for linear in find_linears(draft.model.graph):
            scheme = choice.weights.get(linear.name)
            if scheme is None:
                continue
            activation = str(choice.activations.get(str(linear.x.name), "float"))
            codes = draft.codes(linear.name, linear.w, scheme, draft.ranges.energy(str(linear.x.name)))
            ctx.ledger.record(
                linear.name, weights=str(scheme), activations=draft.learned.get(linear.name, activation),
                weight_sqnr_db=_sqnr(linear.w, codes.dequantized()),
            )  # fmt: skip
        for name, cached in choice.caches.items():
            ctx.ledger.record(name, weights=None, activations=str(cached))


def _record_effects(ctx: Context, draft: Draft, choice: Choice, alpha: float) -> None:
    """What rounded weights alone, rounded activations alone and both together do to the model's first output."""
    if not (choice.weights and (choice.activations or choice.attention or choice.caches)):
        return
    exact = ctx.exact or draft.model
    samples = list(first_samples(_last(ctx, EFFECT_SAMPLES), tokens=EFFECT_TOKENS))
    metric = Metric(ctx, exact, [shortened(exact, sample, EFFECT_TOKENS) for sample in samples])
    alone = {
        "weights": Choice(choice.weights, {}, {}),
        "activations": dataclasses.replace(choice, weights={}),
        "both": choice,
    }
    found: dict[str, Any] = {"measure": "KL divergence, nats a token" if metric.is_perplexity else metric.name}
    for what, part in alone.items():
        model = draft.build(part, alpha)
        if not part.weights:
            forget_grids(model)
        if not part.activations:
            open_clips(model)
        found[what] = float(f"{np.mean(metric.measure(model).divergences):.3g}")
    ctx.ledger.current.facts["effects"] = found


def _record_exceptions(ctx: Context, draft: Draft) -> None:
    """A skip for each linear whose input the gate moved up, so that ``explain`` and the summary count it."""
    gate = ctx.ledger.current.facts.get("gate")
    if gate is None:
        return
    nodes = {linear.name: original_name(linear.node) for linear in find_linears(draft.model.graph)}
    for name, scheme in gate["exceptions"].items():
        for linear in gate["linears"][name]:
            ctx.ledger.skip(linear, f"the gate keeps it in higher precision: {scheme}", nodes[linear])


def _tell_unmatched(ctx: Context, known: Mapping[Op, list[str]]) -> None:
    """A note and a warning for each scope that no operator of its kind is in: most likely it is misspelt."""
    for rule in ctx.recipe.rules:
        if rule.op == "cache" and not known["cache"]:
            warn(NO_CACHE)
            ctx.ledger.note(NO_CACHE)
            continue
        if rule.scope == "*" or any(rule.matches(rule.op, name) for name in known[rule.op]):
            continue
        text = f"scope '{rule.scope}' matches no {rule.op}, so its rule does nothing; {_meant(rule, known)}"
        ctx.ledger.note(text)
        warn(text)


def _meant(rule: Rule, known: Mapping[Op, list[str]]) -> str:
    for op, names in known.items():
        if any(rule.matches(rule.op, name) for name in names):
            return f'did you mean op = "{op}"?'
    names = known[rule.op]
    close = difflib.get_close_matches(rule.scope, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(names[:3])} ..." if names else f"this graph has no {rule.op}"


def _last(ctx: Context, count: int) -> list[Any]:
    """The last samples: transforms search on the first ones, and a gate should not see what they fitted."""
    return list(collections.deque(ctx.samples, maxlen=count))


def _sqnr(before: np.ndarray, after: np.ndarray) -> float:
    error = float(np.square(before - after).sum())
    return round(10 * float(np.log10(float(np.square(before).sum()) / error)), 3) if error else 999.0
