"""A walk over the blocks of a model, for passes that solve or learn them one at a time.

Two streams of activations go along, on disk: the float stream is the float model's, the quantised stream is what
the blocks make that are done, with the recipe's fake quantisation. A block learns to turn the one into the other
(OmniQuant, arXiv 2308.13137, equation 1): errors of earlier blocks are compensated, and memory is that of one
block, whatever the depth.

    for step in reconstruct(ctx, model, self.spec):
        before = step.error()
        for linear in step.linears:               # edit the block's weights in ``model``
            replace_constant(linear.weight, better(linear.w, step.inputs, step.targets), ctx.workspace)
        step.facts["gain"] = before / step.error()

When the loop goes on, the edited block makes the next inputs, and the block is recorded in the ledger and as done:
a run that was killed goes on behind it, when ``folder`` outlives the run.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import onnx_ir as ir

from qcompile import progress
from qcompile.block.cache import Cache, Facts, State, Stream, make_key
from qcompile.block.cut import Part, cut, extract
from qcompile.calibration.draft import Choice, Draft
from qcompile.calibration.observers import sequences
from qcompile.calibration.ranges import calibrate
from qcompile.calibration.samples import Sample
from qcompile.graph.functions import is_op
from qcompile.graph.linears import Linear, find_embeddings, find_linears
from qcompile.graph.sites import ATTENTIONS
from qcompile.pipeline import Arrays, Context, Samples
from qcompile.quant.numerics import CLIP_BELOW_BITS
from qcompile.quant.schemes import ActivationScheme


def reconstruct(
    ctx: Context,
    model: ir.Model,
    label: str,
    *,
    samples: Samples | None = None,
    folder: Path | None = None,
    alpha: float = 1.0,
) -> Iterator[Step]:
    """The blocks of ``model`` in the order in which they run, each ready to be edited in ``model``.

    label: the pass with its options, as written; with the model, the recipe, the seed and the samples it is the
        key under which a run is resumed
    samples: those that the streams are of; the calibration samples when None
    folder: where the streams and the finished blocks are kept. The edited blocks stay there after the run, so that
        a later pass may be killed as well: whoever owns the folder removes it. None: the streams are in the
        workspace, and a killed run starts again
    alpha: the token quantile of static ranges in the quantised stream

    A block that cannot be cut is a skip in the ledger; it passes through the streams in float. On resume, the
    graph of ``model`` is replaced by the one after the last finished block, and its records are made again.
    """
    yield from _Walk(ctx, model, label, ctx.samples if samples is None else samples, folder, alpha).steps()


@dataclasses.dataclass
class Step:
    """One block.

    part: where it begins and ends, and its further inputs; number: from 1
    inputs_float, targets: the float model's residual stream before and behind it, one array (batch, tokens, C)
        for each sample, mapped from disk when it is read
    inputs: the stream that the finished blocks make, to compute the block on
    facts: what the pass wants to have recorded with the block; plain JSON types
    """

    part: Part
    number: int
    inputs_float: Sequence[np.ndarray]
    inputs: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]
    _walk: _Walk
    facts: Facts = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def model(self) -> ir.Model:
        """The whole model, as it is now."""
        return self._walk.model

    @property
    def linears(self) -> list[Linear]:
        """The block's linears in the whole model, as it is now."""
        inside = {linear.name for linear in find_linears(self.block().graph)}
        return [linear for linear in find_linears(self._walk.model.graph) if linear.name in inside]

    def block(self) -> ir.Model:
        """The block as a model of its own, with the weights of the moment, not quantised."""
        return extract(self._walk.model, self.part)

    def float_block(self) -> ir.Model:
        """The block of the float model: what makes ``targets`` of ``inputs_float``."""
        return self._walk.float_block(self.part)

    def quantised(self) -> ir.Model:
        """``block()`` with the recipe's fake quantisation; static ranges are those on ``inputs``."""
        return self._walk.quantised(self.part)

    def learnable(self) -> Learnable:
        """``block()`` with float linears, and how the recipe quantises what they read."""
        return self._walk.learnable(self.part)

    def replace(self, graph: ir.Graph, moved: Mapping[str, Moved] | None = None) -> ir.Graph:
        """Let ``graph``, of a changed clone of the whole model, be the model's; returns the one before.

        moved: (shift, scale), each (C,), by the names of the inputs x for which the block in ``graph`` reads
        (x - shift) / scale
        """
        return self._walk.replace(graph, moved or {})

    def reads_last(self, name: str) -> bool:
        """Whether ``name`` is an input of the block that nothing behind it reads."""
        return self._walk.reads_last(self.part, name)

    def extra(self, sample: int) -> Arrays:
        """The block's inputs besides the stream, as they come with ``inputs``."""
        return {name: self._walk.get("quantised", name, sample) for name in self.part.extra}

    def feeds(self, sample: int) -> Arrays:
        """All inputs of ``block()`` by name, in the quantised stream."""
        return {self.part.input: self.inputs[sample], **self.extra(sample)}

    def feeds_float(self, sample: int) -> Arrays:
        """All inputs of ``block()`` by name, in the float stream."""
        return {name: self._walk.get("float", name, sample) for name in self.part.needs}

    def mask(self, sample: int) -> np.ndarray | None:
        """Which tokens are real: bool (batch, tokens); None where all are."""
        mask = self._walk.masks[sample]
        return mask if mask is not None and mask.shape == self.targets[sample].shape[:2] else None

    def outputs(self, block: ir.Model) -> Iterator[np.ndarray]:
        """The residual stream behind ``block`` on the ``inputs`` of each sample."""
        for values in self._walk.run(block, self.feeds, [self.part.output]):
            yield values[self.part.output]

    def error(self, block: ir.Model | None = None) -> float:
        """Mean over real tokens of (output - target)^2, of ``block`` on ``inputs``; ``quantised()`` when None.

        Infinite where an output is not finite.
        """
        outputs = self.outputs(block if block is not None else self.quantised())
        return _mean(self.squares(sample, output) for sample, output in enumerate(outputs))

    def squares(self, sample: int, output: np.ndarray) -> tuple[float, int]:
        """The sum of (output - target)^2 over the real tokens of ``sample``, and how many numbers that are."""
        mask = self.mask(sample)
        pairs = zip(sequences(output, mask), sequences(self.targets[sample], mask), strict=True)
        found = [(float(np.square(rows - wanted, dtype=np.float64).sum()), rows.size) for rows, wanted in pairs]
        return sum(total for total, _ in found), sum(count for _, count in found)


@dataclasses.dataclass(frozen=True)
class Learnable:
    """A block without quantisation, and what the recipe says of it.

    activations: how a linear's input is quantised, by the linear's name; those with channels in float are left out
    attention: how an attention's operands are quantised, by the name of its output
    ends: of static ranges, (lo, hi), one number or (C,) each, by the value's name
    """

    model: ir.Model
    activations: dict[str, ActivationScheme]
    attention: dict[str, ActivationScheme]
    ends: dict[str, tuple[np.ndarray, np.ndarray]]


Moved = tuple[np.ndarray, np.ndarray]


def _mean(parts: Iterable[tuple[float, int]]) -> float:
    total, count = 0.0, 0
    for square, numbers in parts:
        total, count = total + square, count + numbers
    mean = total / max(count, 1)
    return mean if math.isfinite(mean) else math.inf


class _Values(Sequence[np.ndarray]):
    """One value of one stream on every sample, read when asked for."""

    def __init__(self, walk: _Walk, stream: Stream, name: str) -> None:
        self._walk, self._stream, self._name = walk, stream, name

    def __len__(self) -> int:
        return len(self._walk.masks)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._walk.get(self._stream, self._name, range(len(self))[index])


class _Walk:
    """The streams, and how far they are."""

    def __init__(
        self, ctx: Context, model: ir.Model, label: str, samples: Samples, folder: Path | None, alpha: float
    ) -> None:
        self.model, self._ctx, self._label, self._alpha = model, ctx, label, alpha
        self._samples = samples
        self.masks: list[np.ndarray | None] = [sample.mask for sample in samples]
        ctx.workspace.adopt(model)
        self._float = model.clone()
        made = cut(model)
        for one in made.uncut:
            ctx.ledger.skip(one.name, one.reason, one.node)
        self._blocks = made.blocks
        last = max((place for place, part in enumerate(made.parts) if part.is_block), default=-1)
        self._parts = made.parts[: last + 1]
        self._behind = {name for part in made.parts[last + 1 :] for name in part.needs}
        key = make_key(model, ctx.recipe, ctx.seed, samples)
        self._cache = Cache(folder, label, key, model, ctx.workspace)
        self._shared: set[str] = set()  # values that are the same in both streams, kept once
        self._moved: Mapping[str, Moved] = {}  # inputs of the present block, where that changed what makes them

    def steps(self) -> Iterator[Step]:
        state = self._cache.state
        self._store_inputs()
        self._cache.restore(self.model)
        for name, facts in state.facts.items():
            self._ctx.ledger.record(name, **facts)
        start, done = time.monotonic(), len(state.facts)
        with progress.step(self._label, len(self._blocks) - done) as advance:
            for place, part in enumerate(self._parts):
                if not part.is_block:
                    self._pass_by(part, again=place >= state.parts)
                elif place >= state.parts:
                    yield from self._visit(place, part)
                    advance()
                    self._tell(len(self._cache.state.facts), done, start)

    def _visit(self, place: int, part: Part) -> Iterator[Step]:
        later = self._wanted(place + 1)
        self._store("float", part, self.float_block(part), part.gives)
        before, behind = _Values(self, "float", part.input), _Values(self, "float", part.output)
        inputs = _Values(self, "quantised", part.input)
        step = Step(part, len(self._cache.state.facts) + 1, before, inputs, behind, self)
        yield step
        names = [name for name in part.gives if name in later]
        squares = self._store("quantised", part, self.quantised(part), names, step)
        facts = {"error": _mean(squares), **step.facts}
        self._ctx.ledger.record(part.name, **facts)
        state = self._cache.state
        self._cache.finish(self.model, State(place + 1, {**state.facts, part.name: facts}))
        self._cache.keep(later)
        self._moved = {}
        for held in (self.model, self._float):
            self._ctx.workspace.let_go(held)

    def _wanted(self, place: int) -> set[str]:
        """The values that the parts from ``place`` on read."""
        return {name for part in self._parts[place:] for name in part.needs}

    def _tell(self, done: int, before: int, start: float) -> None:
        seconds = (time.monotonic() - start) / (done - before) * (len(self._blocks) - done)
        if time.monotonic() - start > progress.DELAY_S and seconds > 0:
            left = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
            progress.say(f"{self._label}: {done} of {len(self._blocks)} blocks, about {left} left")

    # ----------------------------------------------------------------- values

    def get(self, stream: Stream, name: str, sample: int) -> np.ndarray:
        found = self._cache.get("float" if name in self._shared else stream, name, sample)
        if stream == "float" or name not in self._moved:
            return found
        shift, scale = self._moved[name]
        return np.asarray((found - shift) / scale, np.float32)

    def run(self, model: ir.Model, feeds: Callable[[int], Arrays], names: Sequence[str]) -> Iterator[Arrays]:
        """The values ``names`` of ``model`` on every sample; ``feeds`` gives the inputs for its number."""
        with self._ctx.runner.opened(model, names) as run:
            for sample in range(len(self.masks)):
                yield run(feeds(sample))

    def _store_inputs(self) -> None:
        """Keep the model's own inputs that some part reads."""
        inputs = {str(value.name) for value in self.model.graph.inputs} & self._wanted(self._cache.state.parts)
        self._shared |= {str(value.name) for value in self.model.graph.inputs}
        for number, sample in enumerate(self._samples):
            for name in inputs & sample.feeds.keys():
                self._cache.put("float", name, number, sample.feeds[name])

    def _store(
        self, stream: Stream, part: Part, model: ir.Model, names: Sequence[str], step: Step | None = None
    ) -> list[tuple[float, int]]:
        """Keep ``names`` of ``part`` for every sample; with ``step`` also its output's distance to the target."""
        squares = []
        fetch = list(dict.fromkeys([*names, part.output] if step is not None else names))
        feeds = lambda sample: {name: self.get(stream, name, sample) for name in part.needs}  # noqa: E731
        for sample, values in enumerate(self.run(model, feeds, fetch) if fetch else ()):
            for name in names:
                self._cache.put(stream, name, sample, values[name])
            if step is not None:
                squares.append(step.squares(sample, values[part.output]))
        return squares

    def _pass_by(self, part: Part, *, again: bool) -> None:
        """Take both streams past what is no block: once for values that no quantisation reaches."""
        changed = [name for name in part.gives if not self._is_shared(part, name)]
        self._shared |= set(part.gives) - set(changed)
        if again:
            self._store("float", part, self.float_block(part), part.gives)
            if changed:
                self._store("quantised", part, self.quantised(part), changed)

    def _is_shared(self, part: Part, name: str) -> bool:
        above = extract(self.model, dataclasses.replace(part, gives=(name,)))
        read = {str(value.name) for value in above.graph.inputs if value.uses()}
        weights = [linear.name for linear in find_linears(above.graph)]
        weights += [str(table.name) for node in find_embeddings(above.graph) if (table := node.inputs[0]) is not None]
        return read <= self._shared and not any(one in self._choice().weights for one in weights)

    # ----------------------------------------------------------------- the parts as they are

    def float_block(self, part: Part) -> ir.Model:
        return extract(self._float, part)

    def replace(self, graph: ir.Graph, moved: Mapping[str, Moved]) -> ir.Graph:
        before, self.model.graph = self.model.graph, graph
        self._moved = moved
        return before

    def reads_last(self, part: Part, name: str) -> bool:
        return name in part.needs and name not in self._wanted(self._parts.index(part) + 1) | self._behind

    def learnable(self, part: Part) -> Learnable:
        draft = self._draft(extract(self.model, part))
        static = _static(draft)
        if static:
            draft.ranges = calibrate(self._ctx, draft.model, static, [], self._quantised_samples(part))
        known = {n: a for n, a in draft.choice.activations.items() if a.outlier_threshold is None}
        readers = {name: linears for name, linears in draft.readers().items() if name in known}
        fixed = {name: scheme for name, scheme in static.items() if scheme.outlier_threshold is None}
        ends = {name: draft.ranges.affine(name, scheme, self._alpha).ends for name, scheme in fixed.items()}
        activations = {linear: known[name] for name, linears in readers.items() for linear in linears}
        return Learnable(draft.model, activations, dict(draft.choice.attention), ends)

    def quantised(self, part: Part) -> ir.Model:
        """``part`` as it is now, with the recipe's fake quantisation."""
        draft = self._draft(extract(self.model, part))
        static = _static(draft)
        narrow = any(scheme.bits < CLIP_BELOW_BITS for scheme in draft.choice.weights.values())
        energy = draft.inputs() if narrow else []
        if static or energy:
            draft.ranges = calibrate(self._ctx, draft.model, static, energy, self._quantised_samples(part))
        return draft.build(alpha=self._alpha)

    def _quantised_samples(self, part: Part) -> Iterator[Sample]:
        for number, mask in enumerate(self.masks):
            yield Sample({name: self.get("quantised", name, number) for name in part.needs}, mask)

    def _draft(self, part: ir.Model) -> Draft:
        """A draft of ``part``; what the recipe says of each linear is decided on the whole model."""
        draft = Draft(part, self._ctx.recipe, self._ctx.workspace)
        draft.choice = self._choice()
        return draft

    def _choice(self) -> Choice:
        return Draft(self.model, self._ctx.recipe, self._ctx.workspace).choice


def _static(draft: Draft) -> dict[str, ActivationScheme]:
    """The activations of the draft's model whose ranges calibration finds."""
    known = draft.choice.activations
    found = {name: known[name] for name in draft.readers()}
    found = {n: s for n, s in found.items() if not s.dynamic or s.outlier_threshold is not None}
    for node in draft.model.graph:
        scheme = draft.choice.attention.get(str(node.outputs[0].name)) if is_op(node, *ATTENTIONS) else None
        if scheme is not None:
            found.update({str(value.name): scheme for value in node.inputs[:3] if value is not None})
    return found
