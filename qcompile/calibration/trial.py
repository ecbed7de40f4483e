"""What a model loses when it is quantised as the recipe says: the measure of a change that concerns all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.calibration.draft import Draft
from qcompile.calibration.metric import Metric
from qcompile.calibration.ranges import calibrate
from qcompile.graph.functions import is_op
from qcompile.graph.sites import ATTENTIONS
from qcompile.pipeline import Context
from qcompile.quant.numerics import CLIP_BELOW_BITS
from qcompile.quant.schemes import ActivationScheme


class Trials:
    """Compares float models of one function by what each loses when it is quantised, on a few samples."""

    def __init__(self, ctx: Context, model: ir.Model, samples: Sequence[Any]) -> None:
        self._ctx, self._samples = ctx, list(samples)
        self._metric = Metric(ctx, model, self._samples)

    def loss(self, model: ir.Model) -> float:
        """Mean divergence of ``model``, quantised, from the float model: nats a token, or 1 - cosine."""
        draft = Draft(model, self._ctx.recipe, self._ctx.workspace)
        calibrate_draft(self._ctx, draft, self._samples)
        return float(np.mean(self._metric.measure(draft.build()).divergences))


def calibrate_draft(ctx: Context, draft: Draft, samples: Sequence[Any] | None = None, energy: bool = True) -> None:
    """Learn the ranges that the draft's schemes need, and with ``energy`` the input energies that narrow clips use."""
    static = {n: s for n, s in draft.choice.activations.items() if not s.dynamic or s.outlier_threshold is not None}
    static |= _attention_operands(draft)
    narrow = energy and any(scheme.bits < CLIP_BELOW_BITS for scheme in draft.choice.weights.values())
    inputs = draft.inputs() if narrow else []
    if static or inputs:
        draft.ranges = calibrate(ctx, draft.model, static, inputs, samples)


def _attention_operands(draft: Draft) -> dict[str, ActivationScheme]:
    found = {}
    for node in draft.model.graph:
        scheme = draft.choice.attention.get(str(node.outputs[0].name)) if is_op(node, *ATTENTIONS) else None
        if scheme is not None:
            found.update({str(v.name): scheme for v in node.inputs[:3] if v is not None})
    return found
