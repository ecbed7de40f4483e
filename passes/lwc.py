"""Learnable weight clipping: block by block, the clips that bring the block's output nearest to the float model's.

rewrite:  linear(x, W, b)  ->  linear(x, V, b), V the values of codes that quantise then writes as they are
          ends of a column's or group's range: sigmoid(u) max W, sigmoid(l) min W, with u and l learned by AdamW on
          |block_quantised(x) - block_float(x_float)|^2, x what the blocks before it make that are done
needs:    calibration samples; torch; W constant and no embedding's table; a block that can be cut and differentiated
ensures:  no block is further from the float model's output, on the samples, than with the recipe's plain rounding;
          codes in the program equal the ones here
source:   OmniQuant, arXiv 2308.13137, equation 2
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile.block.stream import Step, reconstruct
from qcompile.calibration.solvable import solvable
from qcompile.environment import require_torch
from qcompile.errors import UserError
from qcompile.graph.edits import replace_constant
from qcompile.graph.grids import remember_grid
from qcompile.graph.linears import Linear
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Form, Pass, check_range
from qcompile.quant.schemes import WeightScheme


@dataclasses.dataclass(frozen=True)
class Lwc(Pass):
    """Options:

    epochs: times that each block sees the samples
    rate: learning rate of AdamW on the logits of the clips
    schedule: how the rate goes on: constant, or cosine down to zero
    clip_norm: largest norm of a step's gradient
    samples: calibration samples to learn on, the first ones
    """

    name: ClassVar[str] = "lwc"
    preserves: ClassVar[Preserves] = "approximation"
    reads: ClassVar[tuple[Form, ...]] = ("canonical",)

    epochs: int = 5
    rate: float = 0.01
    schedule: Literal["constant", "cosine"] = "cosine"
    clip_norm: float = 1.0
    samples: int = 32

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "epochs", "samples")
        check_range(self, 0, math.inf, "rate", "clip_norm")

    def run(self, model: ir.Model, ctx: Context) -> int:
        require_torch()
        schemes = {linear.name: scheme for linear, scheme in solvable(ctx, model)}
        samples = list(itertools.islice(ctx.samples, self.samples))
        return sum(self._block(ctx, step, schemes) for step in reconstruct(ctx, model, self.spec, samples=samples))

    def _block(self, ctx: Context, step: Step, schemes: dict[str, WeightScheme]) -> int:
        """Learn one block; returns how many weights have new codes."""
        formats = {id(x.weight): (x, schemes[x.name]) for x in step.linears if x.name in schemes}
        if not formats:
            return 0
        try:
            return self._learn(ctx, step, list(formats.values()))
        except UserError as error:
            ctx.ledger.skip(step.name, error.message, error.where)
            return 0

    def _learn(self, ctx: Context, step: Step, formats: list[tuple[Linear, WeightScheme]]) -> int:
        from qcompile.block.clipping import learn_clips
        from qcompile.block.learn import Plan

        plan = Plan(self.epochs, self.schedule, self.clip_norm, ctx.seed)
        floats = [np.array(linear.w) for linear, _ in formats]
        before = step.error()
        outcome, codes = learn_clips(step, formats, self.rate, plan, f"{self.name} {step.name}")
        for (linear, scheme), weight in zip(formats, codes, strict=True):
            remember_grid(linear.weight, weight, scheme, ctx.workspace)
        after = step.error()
        step.facts |= {"plain": before, "start": outcome.start, "learned": outcome.best, "notes": outcome.notes}
        if after < before:
            return len(formats)
        for (linear, _), array in zip(formats, floats, strict=True):
            replace_constant(linear.weight, array, ctx.workspace)
        ctx.ledger.skip(step.name, "plain rounding is nearer to the float model than learned clips", step.name)
        return 0
