"""What the passes share that learn block by block: walk, learn, fold, keep what is better, record."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile.block.cache import Facts
from qcompile.block.places import find_places
from qcompile.block.stream import Moved, Step, reconstruct
from qcompile.calibration.draft import Draft
from qcompile.calibration.samples import first_samples
from qcompile.calibration.sensitivity import choose_alpha
from qcompile.calibration.solvable import solvable
from qcompile.calibration.trial import calibrate_draft
from qcompile.environment import require_torch
from qcompile.errors import UserError
from qcompile.graph.edits import own_initializer
from qcompile.graph.fold import fold
from qcompile.graph.gates import FACTOR, Gate, find_gates, fold_gate
from qcompile.graph.grids import grid_of, remember_grid
from qcompile.graph.linears import find_linears
from qcompile.graph.qdq import quantize_per_token
from qcompile.graph.sites import Kind
from qcompile.pipeline import Context, Form, Pass, check_range
from qcompile.quant.schemes import WeightScheme
from qcompile.recipe import Recipe

if TYPE_CHECKING:
    from qcompile.block.joint import Learned, Rates
    from qcompile.block.quantisers import WeightClip

Schemes = Mapping[str, WeightScheme]
ALPHA_SAMPLES = 32  # as in quantise
KINDS: tuple[Kind, ...] = ("norm", "v_o", "up_down", "q_k")


@dataclasses.dataclass(frozen=True)
class LearnedPass(Pass):
    """A pass that learns something of each block, and keeps it where the block's output comes nearer to the float
    model's. Options:

    epochs: times that each block sees the samples
    schedule: how the rates go on: constant, or cosine down to zero
    clip_norm: largest norm of a step's gradient
    tokens: how many to learn on, of the first calibration samples
    step_tokens: a step takes samples until they have so many: weights are rounded once a step
    """

    reads: ClassVar[tuple[Form, ...]] = ("canonical",)

    epochs: int = 5
    schedule: Literal["constant", "cosine"] = "cosine"
    clip_norm: float = 1.0
    tokens: int = 32 * 512
    step_tokens: int = 128

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "epochs", "tokens", "step_tokens")
        rates = [field.name for field in dataclasses.fields(self) if field.name.endswith("rate")]
        check_range(self, 0, math.inf, "clip_norm", *rates)

    @abc.abstractmethod
    def rates(self) -> Rates:
        """How fast changes and clips are learned, if they are."""

    def kinds(self) -> Sequence[Kind]:
        """Where changes are learned."""
        return ()

    def codes(self) -> bool:
        """Whether the codes of the clips are chosen for good."""
        return False

    def smooths(self) -> bool:
        """Whether scales move inside SwiGLU, whose factors then count as quantised per token."""
        return False

    def starts_from(self, recipe: Recipe) -> str | None:
        if not self.kinds() or getattr(self, "start", "none") == "none":
            return None
        return "os_plus" if any(rule.activations is not None for rule in recipe.rules if rule.op == "linear") else "awq"

    def run(self, model: ir.Model, ctx: Context) -> int:
        require_torch()
        chosen = {linear.name: scheme for linear, scheme in solvable(ctx, model)} if self.codes() else {}
        samples = list(first_samples(ctx.samples, tokens=self.tokens))
        alpha = _alpha(ctx, model)
        walk = reconstruct(ctx, model, self.spec, samples=samples, folder=ctx.resume, alpha=alpha)
        return sum(self._block(ctx, step, chosen) for step in walk)

    def _block(self, ctx: Context, step: Step, chosen: Schemes) -> int:
        """Learn one block; returns how many places and weights have changed."""
        try:
            return self._learn(ctx, step, chosen)
        except UserError as error:
            ctx.ledger.skip(step.name, error.message, error.where)
            return 0

    def _learn(self, ctx: Context, step: Step, chosen: Schemes) -> int:
        from qcompile.block.joint import Task, learn_block
        from qcompile.block.learn import Plan

        trial = step.model.clone()
        places = find_places(ctx, step, trial, self.kinds()) if self.kinds() else []
        gates = _gates(step, trial) if self.smooths() else []
        schemes = _schemes(ctx, step)
        own = {name: scheme for name, scheme in chosen.items() if name in schemes}
        if not (places or gates or own):
            return 0
        factors = [str(linear.output.name) for gate in gates for linear in (gate.gate, gate.up)]
        before = _error(ctx, step, factors)
        plan = Plan(self.epochs, self.schedule, self.clip_norm, ctx.seed, self.step_tokens)
        task = Task(schemes, places, gates, self.rates(), plan, f"{self.name} {step.name}")
        learned = learn_block(step, task)
        original = step.replace(trial.graph, _fold(ctx, trial, learned))
        _choose(ctx, trial, learned.clips, own)
        after, outcome = _error(ctx, step, factors), learned.outcome
        step.facts |= {"plain": before, "start": outcome.start, "learned": outcome.best, "notes": outcome.notes}
        if after < before:
            step.facts |= _described(learned)
            return len(learned.moves) + len(learned.smooths) + len(own)
        step.replace(original)
        ctx.ledger.skip(step.name, f"{self.name} brings it no nearer to the float model than it was", step.name)
        return 0


def _alpha(ctx: Context, model: ir.Model) -> float:
    """The token quantile of static ranges that quantise would choose now."""
    draft = Draft(model, ctx.recipe, ctx.workspace)
    if all(scheme.dynamic or scheme.observer != "token_wise" for scheme in draft.choice.activations.values()):
        return 1.0
    calibrate_draft(ctx, draft, energy=False)
    ctx.ledger.current.facts["alpha"] = choose_alpha(ctx, draft, draft.choice, ALPHA_SAMPLES)
    return float(ctx.ledger.current.facts["alpha"])


def _error(ctx: Context, step: Step, factors: Sequence[str]) -> float:
    """The error of the block with the values ``factors`` quantised per token as well."""
    if not factors:
        return step.error()
    block = step.quantised()
    for node in list(block.graph):
        for value in node.outputs:
            if value.name in factors:
                readers = [(use.node, use.idx) for use in value.uses()]
                quantize_per_token(block, value, readers, FACTOR, ctx.workspace)
    return step.error(block)


def _gates(step: Step, model: ir.Model) -> list[Gate]:
    """Those of the block, in ``model``."""
    inside = {linear.name for linear in step.linears}
    return [gate for gate in find_gates(model) if gate.gate.name in inside and gate.up.name in inside]


def _schemes(ctx: Context, step: Step) -> dict[str, WeightScheme]:
    """The formats of the block's weights whose codes no pass has chosen yet."""
    found = {}
    for linear in step.linears:
        rule = ctx.recipe.for_linear(linear)
        scheme = None if rule is None else rule.weights
        if scheme is not None and not linear.transposed and grid_of(linear.weight, scheme) is None:
            found[linear.name] = scheme
    return found


def _fold(ctx: Context, model: ir.Model, learned: Learned) -> dict[str, Moved]:
    """Put what was learned into ``model``; returns what that changes in the block's inputs."""
    moved = {}
    for move in sorted(learned.moves, key=lambda move: move.place.site.kind == "norm"):
        fold(model, move.place.site, move.scale, move.shift, ctx.workspace)
        if move.place.before:
            moved[str(move.place.site.tensor.name)] = move.shift, move.scale
    for smooth in learned.smooths:
        fold_gate(model, smooth.gate, smooth.scale, ctx.workspace)
    return moved


def _choose(ctx: Context, model: ir.Model, clips: Mapping[str, WeightClip], chosen: Schemes) -> None:
    """Give the weights of ``model`` the codes of their clips."""
    import torch

    for linear in find_linears(model.graph):
        if linear.name in chosen:
            w = torch.from_numpy(np.array(linear.w, np.float32))
            weight = clips[linear.name].cpu().codes(w)
            remember_grid(own_initializer(model, linear.node, 1), weight, chosen[linear.name], ctx.workspace)


def _described(learned: Learned) -> Facts:
    scales = [move.scale for move in learned.moves] + [smooth.scale for smooth in learned.smooths]
    if not scales:
        return {}
    largest = max(float(np.exp(np.abs(np.log(scale)).max())) for scale in scales)
    shifted = any(move.shift.any() for move in learned.moves)
    return {"places": len(learned.moves), "largest_scale": largest, "shifted": shifted}
