"""Rotate: spread outlier channels over all channels by orthogonal matrices that fold into the weights.

rewrite:  residual stream x -> x R: writers W R, norms without gain, readers R^T diag(gamma) W; LayerNorm -> RMSNorm
          values v -> v T of each key-value head: v projection W T, output projection T^T W
          online: down(x) -> down'(x H), H block-diagonal Hadamard and applied at run time, down' = H^T W
          R, T: random signs, Hadamard on the power of two in the width (x) random orthogonal on the rest; by seed
needs:    pre-LN: every writer of the stream linear, every reader a norm that feeds linears alone; a few samples
ensures:  equal to 1e-5; no node is added but those of online (a norm's offset: an Add where a reader has no bias);
          each rotation is there only because the quantised model, or its site, has a smaller error with it
source:   QuaRot (arXiv 2404.00456), SpinQuant (2405.16406), SliceGPT (2401.15024, for LayerNorm)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.calibration.objective import Objective
from qcompile.calibration.samples import first_samples
from qcompile.calibration.search import objectives
from qcompile.calibration.trial import Trials
from qcompile.graph import residual, sites
from qcompile.graph.linears import Linear
from qcompile.graph.provenance import original_name
from qcompile.graph.residual import Stream, find_streams
from qcompile.graph.rotation import (
    hadamard,
    insert_rotation,
    power_of_two_in,
    random_rotation,
    rotate_streams,
    rotate_values,
    turned_blocks,
    turned_rows,
)
from qcompile.graph.sites import Site, find_sites
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Form, Pass, check_range

SMALLEST_BLOCK = 8  # a Hadamard matrix on fewer channels spreads too little
Turn = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rotate(Pass):
    """Options:

    residual: rotate residual streams, where that makes the quantised model better
    v_o: rotate the values of each head, where that makes the output projection better
    online: rotate the input of down projections at run time, where that makes them better
    untie: give a head that shares its table with an embedding a table of its own; off: leave such streams
    scales: judge streams as with the channel scales of a transform that follows; off: as the rotation leaves them
    block: channels that an online rotation mixes at most
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
        changed = model.clone()
        _turn_all(changed, legal, ctx)
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
        _turn_all(model, legal, ctx)
        return len(legal)

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
            columns, rows = site.heads
            random = np.random.default_rng((ctx.seed, number))
            rotations = np.stack([random_rotation(columns.shape[1], random) for _ in columns])
            if _better(site, objective, _value_turn(rows, rotations), ctx, heads=len(columns), nodes_added=0):
                rotate_values(model, site, rotations, ctx.workspace)
                count += 1
        return count

    def _rotate_online(self, model: ir.Model, ctx: Context) -> int:
        found = [site for site in find_sites(model) if site.kind == "up_down"]
        found = [site for site in found if _usable(site, self._block_obstacle(site), ctx)]
        count = 0
        for site, objective in objectives(ctx, model, found, self.tokens, plain=True):
            block = hadamard(self._block_size(site))
            if _better(site, objective, _block_turn(block), ctx, block=len(block), nodes_added=1):
                insert_rotation(model, site.linears[0], block, ctx.workspace)
                count += 1
        return count

    def _block_size(self, site: Site) -> int:
        return min(1 << (self.block.bit_length() - 1), power_of_two_in(site.linears[0].rows))

    def _block_obstacle(self, site: Site) -> str:
        if site.linears[0].chosen:
            return site.reason
        size = self._block_size(site)
        rows = site.linears[0].rows
        return "" if size >= SMALLEST_BLOCK else f"{rows} channels have no Hadamard blocks of {SMALLEST_BLOCK} or more"


def _turn_all(model: ir.Model, numbers: Sequence[int], ctx: Context) -> None:
    """Rotate the streams of those ``numbers``; streams of one width alike, since they may share a table."""
    streams = find_streams(model)
    chosen = [streams[number] for number in numbers]
    for width in sorted({stream.width for stream in chosen}):
        rotation = random_rotation(width, np.random.default_rng(ctx.seed))
        rotate_streams(model, [stream for stream in chosen if stream.width == width], rotation, ctx.workspace)


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


def _value_turn(rows: np.ndarray, rotations: np.ndarray) -> Turn:
    return lambda values: turned_rows(values.T, rows, rotations).T


def _block_turn(block: np.ndarray) -> Turn:
    return lambda values: turned_blocks(values.T, block).T


def _better(site: Site, objective: Objective, turn: Turn, ctx: Context, **facts: Any) -> bool:
    """Whether the site's quantised error is smaller with ``turn``; either is put into the ledger."""
    before, after = objective.turned_loss(lambda values: values), objective.turned_loss(turn)
    if not after < before:
        why = f"its quantised error is no smaller with a rotation: {after:.4g} against {before:.4g}"
        ctx.ledger.skip(sites.describe(site), why, original_name(site.producer))
        return False
    ctx.ledger.record(sites.describe(site), loss_before=before, loss_after=after, **facts)
    return True
