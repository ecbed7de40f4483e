"""GPTQ: round a weight's rows one after the other, each correcting the errors of those before it.

rewrite:  linear(x, W, b)  ->  linear(x, V, b), V the values of codes that quantise then writes as they are
          codes: the least |x W' - x V|^2 over the calibration's tokens, x what the linears before it, already
          quantised, leave of its input; W' = W, or the fit of x W' to the float model's x W
          where there is a bias, x is taken about its mean, and the bias becomes b + mean(x_float) W - mean(x) V
          found row after row, then by sweeps that refit the scales and move one code at a time
needs:    calibration samples; W constant and no embedding's table
ensures:  no column has a larger error on its own objective than rounded to nearest with a searched clip; a token that
          is far larger than the rest counts no more than all of them; codes in the program equal the ones here
source:   arXiv 2210.17323; sweeps: QuantEase, arXiv 2309.01885; the fit: GPTAQ, arXiv 2504.02692
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile.calibration.compensate import Quadratic, Settings, solve
from qcompile.calibration.moments import Means, Moments, gather
from qcompile.calibration.solvable import hand_in, solvable
from qcompile.calibration.stages import Stage, Stream, find_stages
from qcompile.graph.edits import own_initializer
from qcompile.graph.grids import correct
from qcompile.graph.linears import Linear, find_linears
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Form, Pass, check_range
from qcompile.progress import track
from qcompile.quant.schemes import ActivationScheme, WeightScheme

STEP = 0.07  # between the factors on a scale that are tried


@dataclasses.dataclass(frozen=True)
class Gptq(Pass):
    """Options:

    fit: what the output should be: the float model's, or the same weight's on the quantised model's input
    damping: share of the mean energy of the inputs that is added to the energy of each
    act_order: rows of the largest inputs first
    scales: scales tried for each column: the one of the searched clip, and ever smaller ones
    sweeps: of refitting scales and moving single codes
    """

    name: ClassVar[str] = "gptq"
    preserves: ClassVar[Preserves] = "approximation"
    reads: ClassVar[tuple[Form, ...]] = ("canonical",)

    fit: Literal["float", "own"] = "float"
    damping: float = 0.01
    act_order: bool = True
    scales: int = 3
    sweeps: int = 3

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "damping")
        check_range(self, 1, math.inf, "scales")
        check_range(self, 0, math.inf, "sweeps")

    def run(self, model: ir.Model, ctx: Context) -> int:
        found = solvable(ctx, model)
        schemes = {linear.name: scheme for linear, scheme in found}
        stages = find_stages([linear for linear, _ in found])
        readers = _readers(stages)
        waiting: dict[int, Moments] = {}
        with contextlib.ExitStack() as stack:
            own = stack.enter_context(Stream(ctx, model, stages, _at_run_time(ctx, model)))
            other = stack.enter_context(_float_stream(ctx, model, stages)) if self.fit == "float" else None
            for stage in track(stages, "solving"):
                own.advance()
                if other is not None:
                    other.advance()
                alone = all(linear.bias is not None and readers[id(linear.weight)] == 1 for linear in stage.linears)
                moments = gather(own.rows, None if other is None else other.rows, centred=alone)
                ready = _ready(stage, moments, waiting, readers)
                self._solve(model, ctx, ready, schemes)
        return len({id(linear.weight) for linear, _ in found})

    def _solve(
        self, model: ir.Model, ctx: Context, ready: list[tuple[Linear, Moments]], schemes: dict[str, WeightScheme]
    ) -> None:
        factors = tuple(1 - STEP * i for i in range(self.scales))
        settings = Settings(self.damping, self.act_order, factors, self.sweeps)
        held: dict[int, Quadratic] = {}  # siblings have the same inputs
        for linear, moments in ready:
            if id(moments) not in held:
                held = {id(moments): Quadratic(moments, settings)}
            scheme = schemes[linear.name]
            w = np.asarray(linear.w, np.float32)
            solved = solve(w, held[id(moments)], scheme, settings)
            if moments.means is not None:
                _correct(model, ctx, linear, moments.means, w, solved.weight.dequantized())
            hand_in(ctx, linear, solved.weight, scheme, solved.error_nearest, solved.error)


def _correct(model: ir.Model, ctx: Context, linear: Linear, means: Means, w: np.ndarray, v: np.ndarray) -> None:
    """Let the bias of ``linear`` take up what ``v`` for ``w``, and rounded inputs, do to its mean output."""
    assert linear.add is not None and linear.bias is not None
    bias = linear.bias + (means.x + means.change) @ w - means.x @ v
    correct(own_initializer(model, linear.add, 1), np.asarray(bias, np.float32), ctx.workspace)


def _readers(stages: list[Stage]) -> dict[int, int]:
    """How many linears have each matrix."""
    count: dict[int, int] = {}
    for stage in stages:
        for linear in stage.linears:
            count[id(linear.weight)] = count.get(id(linear.weight), 0) + 1
    return count


def _ready(
    stage: Stage, moments: Moments, waiting: dict[int, Moments], readers: dict[int, int]
) -> list[tuple[Linear, Moments]]:
    """The linears of the stage whose matrix has no reader later on, with the moments of all its readers' inputs."""
    found = []
    for linear in stage.linears:
        key = id(linear.weight)
        total = waiting.pop(key) + moments if key in waiting else moments
        readers[key] -= 1
        if readers[key]:
            waiting[key] = total
        else:
            found.append((linear, total))
    return found


def _at_run_time(ctx: Context, model: ir.Model) -> dict[str, ActivationScheme]:
    """The inputs of linears that the program quantises token by token, with their schemes."""
    found = {}
    for linear in find_linears(model.graph):
        rule = ctx.recipe.for_linear(linear)
        scheme = None if rule is None else rule.activations
        if scheme is not None and scheme.dynamic and scheme.outlier_threshold is None:
            found[str(linear.x.name)] = scheme
    return found


def _float_stream(ctx: Context, model: ir.Model, stages: list[Stage]) -> Stream:
    """The stages in a copy of the model that keeps its weights."""
    clone = model.clone()
    copies = {linear.name: linear for linear in find_linears(clone.graph)}
    return Stream(ctx, clone, [Stage(tuple(copies[linear.name] for linear in stage.linears)) for stage in stages], {})
