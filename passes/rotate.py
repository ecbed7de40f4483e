"""Rotate: spread outlier channels over others by matrices that fold into the weights.

rewrite:  residual stream x -> x R: writers W R, norms without gain, readers R^T diag(gamma) W; LayerNorm -> RMSNorm
          values v -> v T of each key-value head: v projection W T, output projection T^-1 W
          online: down(x) -> down'(x / s H), H block-diagonal Hadamard and applied at run time, down' = H^T diag(s) W
          R: channels sorted by size against their readers' weights, then signs and Hadamard in runs of ``block``: like
          channels share, and one that is large but hardly read does not stretch the range of those that matter
          T: the inverse of the second moment of a head's values meets that of its readers' weights half-way, then
          Hadamard; channel scales of norms and gates follow R, since a rotation leaves the runs differently large
needs:    pre-LN: every writer of the stream linear, every reader a norm that feeds linears alone; a few samples
ensures:  equal to 1e-5; no node is added but those of online (a norm's offset: an Add where a reader has no bias);
          each matrix is there only because the quantised model, or its site, has a smaller error with it
source:   QuaRot (arXiv 2404.00456), SpinQuant (2405.16406), SliceGPT (2401.15024, for LayerNorm); scales after a
          rotation: OSTQuant (2501.13987); invertible matrices of values: FPTQuant (2506.04985)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.calibration.objective import Objective, Turn
from qcompile.calibration.ranges import Ranges, calibrate
from qcompile.calibration.samples import first_samples
from qcompile.calibration.search import objectives, power_scale
from qcompile.calibration.trial import EXPONENT, Trials, fold_scales, row_size
from qcompile.graph import residual, sites
from qcompile.graph.edits import constant_array
from qcompile.graph.fold import fold, renewed
from qcompile.graph.linears import Linear
from qcompile.graph.provenance import original_name
from qcompile.graph.residual import Stream, find_streams
from qcompile.graph.rotation import (
    balancing_matrix,
    blocked_rotation,
    hadamard,
    insert_rotation,
    power_of_two_in,
    rotate_streams,
    rotate_values,
    turned_blocks,
    turned_rows,
)
from qcompile.graph.sites import Site, find_sites
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Form, Pass, check_range

SMALLEST_BLOCK = 8  # a Hadamard matrix on fewer channels spreads too little
TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class Rotate(Pass):
    """Options:

    residual: rotate residual streams, where that makes the quantised model better
    v_o: turn the values of each head, where that makes the output projection better
    online: rotate the input of down projections at run time, where that makes them better
    untie: give a head that shares its table with an embedding a table of its own; off: leave such streams
    scales: fold channel scales into norms and gates beside a rotation; what is not rotated is judged with them as well
    block: channels that are mixed at most, in a residual stream and by an online rotation
    tokens: tokens that the choices are made on, about
    """

    name: ClassVar[str] = "rotate"
    preserves: ClassVar[Preserves] = "function"
    reads: ClassVar[tuple[Form, ...]] = ("canonical",)

    residual: bool = True
    v_o: bool = True
    online: bool = False
    untie: bool = True
    scales: bool = True
    block: int = 64
    tokens: int = 512

    def __post_init__(self) -> None:
        check_range(self, SMALLEST_BLOCK, math.inf, "block")
        check_range(self, 1, math.inf, "tokens")

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Choose and apply; returns how many streams and sites were rotated. The others are left with a reason."""
        if not ctx.recipe.rules:
            ctx.ledger.note("nothing to rotate for: this recipe quantises nothing")
            return 0
        count = self._rotate_residual(model, ctx) if self.residual else 0
        count += self._rotate_values(model, ctx) if self.v_o else 0
        return count + (self._rotate_online(model, ctx) if self.online else 0)

    # ----------------------------------------------------------------- residual streams

    def _rotate_residual(self, model: ir.Model, ctx: Context) -> int:
        streams = find_streams(model)
        legal = [number for number, stream in enumerate(streams) if self._legal(stream, ctx)]
        if not legal:
            return 0
        samples = list(first_samples(ctx.samples, tokens=self.tokens))
        trials = Trials(ctx, model, samples, scales=self.scales)
        rotations = self._rotations([streams[number] for number in legal], ctx, model, samples)
        changed = model.clone()
        _turn_all(changed, legal, rotations, ctx)
        ctx.workspace.let_go(model)
        before, after = trials.loss(model), trials.loss(changed)
        if not after < before:
            for stream in (streams[number] for number in legal):
                why = f"the quantised model is no better when it is rotated: {after:.4g} against {before:.4g}"
                ctx.ledger.skip(residual.describe(stream), why, original_name(stream.norms[0].node))
            return 0
        for stream in (streams[number] for number in legal):
            ctx.ledger.record(
                residual.describe(stream), channels=stream.width, readers=len(_readers(stream)),
                writers=len(stream.linears) + len(stream.constants) + len(stream.patches),
                mean_taken_off=stream.centred, tables_added=len(stream.tied_heads),
                loss_before=before, loss_after=after,
            )  # fmt: skip
        _turn_all(model, legal, rotations, ctx)
        for site in fold_scales(ctx, model, samples) if self.scales else ():
            ctx.ledger.record(sites.describe(site), scaled=True)
        return len(legal)

    def _rotations(
        self, streams: Sequence[Stream], ctx: Context, model: ir.Model, samples: Sequence[Any]
    ) -> dict[int, np.ndarray]:
        """The rotation of each width; streams of one width have the same, since they may share a table."""
        names = {str(norm.node.inputs[0].name) for stream in streams for norm in stream.norms}  # type: ignore[union-attr]
        ranges = calibrate(ctx, model, {}, sorted(names), samples)
        order = {width: _sorted(streams, width, ranges) for width in sorted({stream.width for stream in streams})}
        random = {width: np.random.default_rng(ctx.seed) for width in order}
        return {width: blocked_rotation(found, self.block, random[width]) for width, found in order.items()}

    def _legal(self, stream: Stream, ctx: Context) -> bool:
        reason = stream.reason
        if not reason and stream.tied_heads and not self.untie:
            reason = "the head shares its table with an embedding, and untie is off"
        if reason:
            ctx.ledger.skip(residual.describe(stream), reason, original_name(stream.node or stream.norms[0].node))
        return not reason

    # ----------------------------------------------------------------- sites

    def _rotate_values(self, model: ir.Model, ctx: Context) -> int:
        found = [site for site in find_sites(model) if site.kind == "v_o" and _usable(site, _obstacle(site), ctx)]
        count = 0
        for number, (site, objective) in enumerate(objectives(ctx, model, found, self.tokens, plain=True)):
            assert site.heads is not None
            matrices = _balanced(objective, site.heads[1], np.random.default_rng((ctx.seed, number)))
            turns = _value_turns(site.heads[1], matrices)
            if _better(site, objective, turns, ctx, heads=len(matrices), nodes_added=0):
                rotate_values(model, site, matrices, ctx.workspace)
                count += 1
        return count

    def _rotate_online(self, model: ir.Model, ctx: Context) -> int:
        found = [site for site in find_sites(model) if site.kind == "up_down"]
        found = [site for site in found if _usable(site, self._block_obstacle(site), ctx)]
        count = 0
        for site, objective in objectives(ctx, model, found, self.tokens, plain=True):
            block, scale = hadamard(self._block_size(site)), self._scale(site, objective)
            if _better(site, objective, _block_turns(block, scale), ctx, block=len(block), nodes_added=1):
                if not site.reason:
                    fold(model, site, scale, np.zeros_like(scale), ctx.workspace)
                insert_rotation(model, renewed(site.linears[0]), block, ctx.workspace)
                count += 1
        return count

    def _scale(self, site: Site, objective: Objective) -> np.ndarray:
        """The scale of each channel before it is mixed with others; ones where none can be folded."""
        size, weight = objective.energy(np.zeros(site.channels, np.float32)), objective.weight_size
        return power_scale(size, weight, EXPONENT) if self.scales and not site.reason else np.ones_like(size)

    def _block_size(self, site: Site) -> int:
        return min(1 << (self.block.bit_length() - 1), power_of_two_in(site.linears[0].rows))

    def _block_obstacle(self, site: Site) -> str:
        if site.linears[0].chosen:
            return site.reason
        size = self._block_size(site)
        rows = site.linears[0].rows
        return "" if size >= SMALLEST_BLOCK else f"{rows} channels have no Hadamard blocks of {SMALLEST_BLOCK} or more"


def _turn_all(model: ir.Model, numbers: Sequence[int], rotations: dict[int, np.ndarray], ctx: Context) -> None:
    """Rotate the streams of those ``numbers`` by the rotations of their widths."""
    streams = find_streams(model)
    chosen = [streams[number] for number in numbers]
    for width, rotation in rotations.items():
        rotate_streams(model, [stream for stream in chosen if stream.width == width], rotation, ctx.workspace)


def _sorted(streams: Sequence[Stream], width: int, ranges: Ranges) -> np.ndarray:
    """The channels of all streams of ``width``, those first that are the largest against their readers' weights."""
    total = np.zeros(width)
    for norm in (norm for stream in streams if stream.width == width for norm in stream.norms):
        energy = ranges.energy(str(norm.node.inputs[0].name))  # type: ignore[union-attr]
        assert energy is not None
        size = np.sqrt(np.asarray(energy, np.float64))
        gain = np.asarray(constant_array(norm.node.inputs[1]), np.float64)
        weight = np.abs(gain) * row_size(norm.linears)
        total += np.log(np.maximum(size, TINY)) - np.log(np.maximum(weight, TINY))
    return np.argsort(-total, kind="stable")


def _balanced(objective: Objective, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The matrix of each key-value head that ``rows`` (kv heads, times, d) of the projection read: (kv heads, d, d)."""
    x, w = objective.unit_rows(), objective.weights_of_rows
    found = []
    for head in rows:
        inputs = np.sum([x[:, at].T @ x[:, at] for at in head], axis=0) / len(x)
        weights = np.sum([w[at] @ w[at].T for at in head], axis=0) / w.shape[1]
        found.append(balancing_matrix(inputs, weights, random))
    volume = float(np.mean([np.linalg.slogdet(matrix)[1] for matrix in found])) / rows.shape[2]
    return np.stack(found) / math.exp(volume)


def _readers(stream: Stream) -> list[Linear]:
    return [*stream.direct, *(linear for norm in stream.norms for linear in norm.linears)]


def _obstacle(site: Site) -> str:
    if site.reason or site.linears[0].chosen:
        return site.reason or "the output projections are experts chosen for each token"
    return "" if site.heads is not None else "its rows do not hold whole heads"


def _usable(site: Site, reason: str, ctx: Context) -> bool:
    rule = ctx.recipe.for_linear(site.linears[0])
    if rule is None or rule.weights is None:
        reason = "the recipe keeps it float"
    if reason:
        ctx.ledger.skip(sites.describe(site), reason, original_name(site.producer))
    return not reason


def _value_turns(rows: np.ndarray, matrices: np.ndarray) -> tuple[Turn, Turn]:
    inverse, transposed = np.linalg.inv(matrices), np.swapaxes(matrices, 1, 2)
    return lambda x: turned_rows(x.T, rows, transposed).T, lambda w: turned_rows(w.T, rows, inverse).T


def _block_turns(block: np.ndarray, scale: np.ndarray) -> tuple[Turn, Turn]:
    return lambda x: turned_blocks((x / scale).T, block).T, lambda w: turned_blocks((w * scale).T, block).T


def _better(site: Site, objective: Objective, turns: tuple[Turn, Turn], ctx: Context, **facts: Any) -> bool:
    """Whether the site's quantised error is smaller with ``turns``; either is put into the ledger."""
    before, after = objective.turned_loss(_same, _same), objective.turned_loss(*turns)
    if not after < before:
        why = f"its quantised error is no smaller when it is turned: {after:.4g} against {before:.4g}"
        ctx.ledger.skip(sites.describe(site), why, original_name(site.producer))
        return False
    ctx.ledger.record(sites.describe(site), loss_before=before, loss_after=after, **facts)
    return True


def _same(values: np.ndarray) -> np.ndarray:
    return values
