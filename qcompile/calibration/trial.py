"""What a model loses when it is quantised as the recipe says: the measure of a change that concerns all of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.calibration.draft import Draft
from qcompile.calibration.keys import key_means
from qcompile.calibration.metric import Metric
from qcompile.calibration.ranges import calibrate
from qcompile.calibration.search import power_scale
from qcompile.graph.fold import fold
from qcompile.graph.functions import is_op
from qcompile.graph.linears import Linear
from qcompile.graph.sites import ATTENTIONS, Site, find_sites
from qcompile.pipeline import Context
from qcompile.quant.numerics import CLIP_BELOW_BITS
from qcompile.quant.schemes import ActivationScheme

EXPONENT = 0.5  # of the scales that stand for what a transform would find


class Trials:
    """Compares float models of one function by what each loses when it is quantised, on a few samples.

    ``scales``: each with plain channel scales folded into its norms first, as a transform that follows would do.
    """

    def __init__(self, ctx: Context, model: ir.Model, samples: Sequence[Any], scales: bool = False) -> None:
        self._ctx, self._samples, self._scales = ctx, list(samples), scales
        self._metric = Metric(ctx, model, self._samples)

    def loss(self, model: ir.Model) -> float:
        """Mean divergence of ``model``, quantised, from the float model: nats a token, or 1 - cosine."""
        scaled = model
        if self._scales:
            scaled = model.clone()
            fold_scales(self._ctx, scaled, self._samples)
            self._ctx.workspace.let_go(model)
        draft = Draft(scaled, self._ctx.recipe, self._ctx.workspace)
        calibrate_draft(self._ctx, draft, self._samples)
        return float(np.mean(self._metric.measure(draft.build()).divergences))


def fold_scales(ctx: Context, model: ir.Model, samples: Sequence[Any]) -> list[Site]:
    """Fold s_j = size_j^a / |W_j|^(1 - a) into every norm and gate whose readers' activations are quantised."""
    found = [site for site in find_sites(model) if site.kind in ("norm", "up_down") and _scalable(ctx, site)]
    names = {id(site): str(site.linears[0].x.name) for site in found}
    ranges = calibrate(ctx, model, {}, list(dict.fromkeys(names.values())), samples)
    for site in found:
        energy = ranges.energy(names[id(site)])
        assert energy is not None
        scale = power_scale(np.sqrt(energy), row_size((*site.linears, *site.experts)), EXPONENT)
        fold(model, site, scale, np.zeros_like(scale), ctx.workspace)
    return found


def _scalable(ctx: Context, site: Site) -> bool:
    rule = ctx.recipe.for_linear(site.linears[0])
    return not site.reason and rule is not None and rule.activations is not None


def row_size(linears: Iterable[Linear]) -> np.ndarray:
    """Root mean square of every row of all the linears' weights, (channels,)."""
    readers = [np.asarray(r.w).reshape(-1, r.rows, r.columns) for r in linears]
    columns = sum(len(w) * w.shape[2] for w in readers)
    squares = np.sum([np.einsum("ekn,ekn->k", w, w) for w in readers], axis=0)
    return np.asarray(np.sqrt(squares / columns), np.float32)


def calibrate_draft(ctx: Context, draft: Draft, samples: Sequence[Any] | None = None, energy: bool = True) -> None:
    """Learn the ranges that the draft's schemes need, and with ``energy`` the input energies that narrow clips use."""
    static = {n: s for n, s in draft.choice.activations.items() if not s.dynamic or s.outlier_threshold is not None}
    static |= _attention_operands(draft)
    narrow = energy and any(scheme.bits < CLIP_BELOW_BITS for scheme in draft.choice.weights.values())
    inputs = draft.inputs() if narrow else []
    if static or inputs:
        draft.ranges = calibrate(ctx, draft.model, static, inputs, samples)
    narrow_caches = [name for name, scheme in draft.choice.caches.items() if scheme.bits < CLIP_BELOW_BITS]
    draft.centres = key_means(ctx, draft.model, narrow_caches, samples)


def _attention_operands(draft: Draft) -> dict[str, ActivationScheme]:
    found = {}
    for node in draft.model.graph:
        scheme = draft.choice.attention.get(str(node.outputs[0].name)) if is_op(node, *ATTENTIONS) else None
        if scheme is not None:
            found.update({str(v.name): scheme for v in node.inputs[:3] if v is not None})
    return found
