"""Learn the equivalent changes and the weight clips of one block together, through its activations' quantisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from qcompile.block.clipping import STARTS, Start, started
from qcompile.block.equivalent import AndBack, Change, Heads, Input, Meter, Reader
from qcompile.block.examples import Examples
from qcompile.block.fx import to_torch
from qcompile.block.learn import Group, Outcome, Plan, Tensors, best_device, learn
from qcompile.block.places import Place
from qcompile.block.quantisers import WeightClip
from qcompile.block.stream import Step
from qcompile.graph.edits import own_initializer
from qcompile.graph.functions import is_op
from qcompile.graph.gates import FACTOR, Gate
from qcompile.graph.linears import Linear, find_linears
from qcompile.graph.sites import ATTENTIONS
from qcompile.quant.schemes import ActivationScheme, WeightScheme

Schemes = Mapping[str, WeightScheme]  # of the block's weights, by the linear's name
COARSE_ROWS = 256  # smaller blocks learn in no time, and lose small gains
COARSE_BITS = 6  # a product in bfloat16 adds 0.003 of the error that rounding to so many bits makes; at 8 bits 0.05


@dataclasses.dataclass(frozen=True)
class Rates:
    """Learning rates: of the logarithms of scales (and of shifts), and of the logits of clips. 0: not learned."""

    change: float
    clip: float


@dataclasses.dataclass(frozen=True)
class Task:
    """What to learn of a block, and how; ``gates``: to move scales in, their factors quantised meanwhile."""

    schemes: Schemes
    places: Sequence[Place]
    gates: Sequence[Gate]
    rates: Rates
    plan: Plan
    label: str


@dataclasses.dataclass(frozen=True)
class Move:
    """What was learned at a place: shift and scale of each channel of its site."""

    place: Place
    shift: np.ndarray
    scale: np.ndarray


@dataclasses.dataclass(frozen=True)
class Smooth:
    """What was learned at a gate."""

    gate: Gate
    scale: np.ndarray


@dataclasses.dataclass(frozen=True)
class Learned:
    """clips: by the linear's name, good for its weight after the moves"""

    outcome: Outcome
    moves: Sequence[Move]
    smooths: Sequence[Smooth]
    clips: Mapping[str, WeightClip]


def learn_block(step: Step, task: Task) -> Learned:
    """The changes and the clips that bring the block's output nearest to the float model's.

    Changes start at none. Clips start where plain rounding or a finer search puts them, whichever the block's output
    says is better. Raises UserError when an operator of the block cannot be learned through.
    """
    return _Joint(step, task).learn()


@dataclasses.dataclass
class _Weight:
    """One matrix of the block: what it is called in the graph, how it is stored (None: float), what it reads."""

    linear: Linear
    name: str
    scheme: WeightScheme | None
    x: str
    bias: str | None
    reader: Reader | None = None
    changed_before: bool = False  # what it reads was changed where attention reads it


class _Joint:
    """The block as a differentiable graph with quantisers in it, and the parameters."""

    def __init__(self, step: Step, task: Task) -> None:
        self._step, self._task, self._rates = step, task, task.rates
        self._device = best_device()
        self._examples = Examples(step)
        self._block = step.learnable()
        self._weights = _weights(self._block.model, task.schemes)
        self._attention = list(self._operands())
        self._meters = self._measure()
        self._readers: dict[str, Reader] = {}  # of attention's operands, by the value's name
        self._changes = [self._change(place) for place in task.places]
        self._graph = to_torch(self._block.model, step.name)
        self._put_inputs()
        self._smooths = [self._put_gate(gate) for gate in task.gates]
        self._graph.module.to(self._device)
        self._clips: dict[str, WeightClip] = {}

    def learn(self) -> Learned:
        starts = STARTS if self._rates.clip else STARTS[:1]
        plan = dataclasses.replace(self._task.plan, coarse=self._is_coarse())
        errors = [self._learn(start, dataclasses.replace(plan, epochs=0)).start for start in starts]
        best = int(np.argmin(errors))
        outcome = self._learn(starts[best], plan, errors[best])
        clips = {weight.linear.name: self._clips[weight.name] for weight, _ in self._quantised()}
        scales = [change.scale().detach().cpu().double().numpy() for change in self._smooths]
        smooths = [Smooth(gate, scale) for gate, scale in zip(self._task.gates, scales, strict=True)]
        return Learned(outcome, list(self._moves()), smooths, clips)

    def _quantised(self) -> Iterator[tuple[_Weight, WeightScheme]]:
        return ((weight, weight.scheme) for weight in self._weights if weight.scheme is not None)

    def _is_coarse(self) -> bool:
        """Whether bfloat16, of 8 bits, hides little: no quantiser has so many; and saves time: products are large."""
        if max((weight.linear.rows for weight in self._weights), default=0) < COARSE_ROWS:
            return False
        bits = [scheme.bits for _, scheme in self._quantised()]
        known = (*self._block.activations.values(), *self._block.attention.values(), *[FACTOR for _ in self._smooths])
        return max((*bits, *(scheme.bits for scheme in known)), default=COARSE_BITS + 1) <= COARSE_BITS

    def _learn(self, start: Start, plan: Plan, error: float | None = None) -> Outcome:
        for weight, scheme in self._quantised():
            grid = start(weight.linear, scheme, self._meters[weight.x].energy)
            self._clips[weight.name] = started(weight.linear, scheme, grid).to(self._device)
        clips = [parameter for clip in self._clips.values() for parameter in clip.parameters()]
        changes = [parameter for change in (*self._changes, *self._smooths) for parameter in change.parameters()]
        rated = [(changes, self._rates.change), (clips, self._rates.clip)]
        for parameters, rate in rated:
            for parameter in parameters:
                parameter.requires_grad_(rate > 0)
        groups = [Group(parameters, rate) for parameters, rate in rated if rate and parameters]
        run, examples, label = self._run, self._examples, self._task.label
        return learn(self._changed, run, groups, examples, plan, label, self._device, error)

    # ----------------------------------------------------------------- one step

    def _changed(self) -> Tensors:
        found: dict[str, torch.Tensor] = {}
        for weight, _ in self._quantised():
            w = self._graph.constant(weight.name)
            if weight.reader is not None:
                shift = weight.reader.shift()
                if shift is not None and weight.bias is not None:
                    found[weight.bias] = self._graph.constant(weight.bias) + shift @ w
                w = w * weight.reader.scale()[:, None]
            found[weight.name] = self._clips[weight.name](w)
        return found

    def _run(self, changed: Tensors, inputs: Tensors) -> torch.Tensor:
        return self._graph.run(inputs, changed)[self._step.part.output]

    # ----------------------------------------------------------------- the parameters

    def _measure(self) -> dict[str, Meter]:
        """What the linears read in the quantised stream, by the value's name."""
        graph = to_torch(self._block.model, self._step.name)
        meters: dict[str, Meter] = {}
        for number, (x, weights) in enumerate(_by_input(self._weights).items()):
            meters[x] = Meter()
            graph.read_through([(weight.linear.node, 0) for weight in weights], meters[x], f"meter_{number}")
        for node, index, x, _ in self._attention:
            meters[x] = Meter()
            graph.read_through([(node, index)], Heads(meters[x]), f"meter_{len(meters)}")
        graph.module.to(self._device)
        with torch.no_grad():
            for example in self._examples:
                for meter in meters.values():
                    meter.mask = example.mask
                graph.run({n: torch.from_numpy(np.array(a)).to(self._device) for n, a in example.inputs.items()})
        return meters

    def _operands(self) -> Iterator[tuple[ir.Node, int, str, ActivationScheme]]:
        """What attentions read that is quantised: (node, index of the input, the value's name, scheme)."""
        for node in self._block.model.graph:
            scheme = self._block.attention.get(str(node.outputs[0].name)) if is_op(node, *ATTENTIONS) else None
            if scheme is not None:
                yield from ((node, index, str(node.inputs[index].name), scheme) for index in range(3))  # type: ignore[union-attr]

    def _change(self, place: Place) -> Change:
        """The parameters of ``place``, known to the weights and operands that it reaches."""
        site = place.site
        output = str(site.producer.outputs[0].name)
        operands = [node.inputs[index] for node, index, _, _ in self._attention if node.outputs[0].name == output]
        names = {linear.name for linear in site.linears} if site.kind != "q_k" else {}
        found = [weight for weight, _ in self._quantised() if weight.linear.name in names]
        unit = None
        if place.shifts and found:
            unit = np.zeros(site.channels, np.float32)
            rows = np.arange(site.channels) if site.expand is None else site.expand
            np.maximum.at(unit, rows, self._meters[found[0].x].size)
        change = Change(np.arange(site.channels) if site.ties is None else site.ties, unit).to(self._device)
        for weight in found:
            weight.reader = Reader(change, site.expand)
            weight.changed_before = site.kind == "v_o" and bool(operands)
        if site.kind == "q_k":
            assert site.expand is not None
            queries, keys, _ = operands
            assert queries is not None and keys is not None and keys.shape is not None
            by_head = site.expand.reshape(-1, int(keys.shape[-1]))  # type: ignore[arg-type]
            times = site.expand.size // len(self._meters[str(keys.name)].size)  # query heads that read one key head
            self._readers[str(queries.name)] = Reader(change, site.expand, inverse=True)
            self._readers[str(keys.name)] = Reader(change, by_head[::times].reshape(-1))
        elif site.kind == "v_o" and operands:
            assert site.heads is not None
            _, expand = np.unique(site.heads[0], return_inverse=True)
            self._readers[str(operands[2].name)] = Reader(change, expand.reshape(-1))  # type: ignore[union-attr]
        return change

    def _put_inputs(self) -> None:
        known, ends = self._block.activations, self._block.ends
        for x, weights in _by_input(self._weights).items():
            groups: dict[tuple[ActivationScheme | None, bool], list[_Weight]] = {}
            for weight in weights:
                changed = weight.reader is not None and not weight.changed_before
                groups.setdefault((known.get(weight.linear.name), changed), []).append(weight)
            for (scheme, changed), group in groups.items():
                made = Input(group[0].reader if changed else None, scheme, ends.get(x), self._meters[x].reach)
                self._graph.read_through([(weight.linear.node, 0) for weight in group], made, f"input_{group[0].name}")
        for node, index, x, scheme in self._attention:
            made = Input(self._readers.get(x), scheme, ends[x], self._meters[x].reach)
            self._graph.read_through([(node, index)], Heads(made), f"operand_{x}")

    def _put_gate(self, gate: Gate) -> Change:
        """Let the factors of ``gate`` be scaled, quantised and scaled back."""
        nodes = {str(node.outputs[0].name): node for node in self._block.model.graph}
        silu, product = (nodes[str(node.outputs[0].name)] for node in (gate.silu, gate.product))
        change = Change(np.arange(gate.gate.columns), None).to(self._device)
        for node, index, inverse in ((silu, 0, True), (product, gate.index, False)):
            self._graph.read_through([(node, index)], AndBack(Reader(change, None, inverse)), f"factor_{node.name}")
        return change

    def _moves(self) -> Iterator[Move]:
        for place, change in zip(self._task.places, self._changes, strict=True):
            scale, shift = change.scale().detach().cpu().double().numpy(), change.shift()
            moved = np.zeros_like(scale) if shift is None else shift.detach().cpu().double().numpy()
            yield Move(place, moved, scale)


def _by_input(weights: Sequence[_Weight]) -> dict[str, list[_Weight]]:
    found: dict[str, list[_Weight]] = {}
    for weight in weights:
        found.setdefault(weight.x, []).append(weight)
    return found


def _weights(model: ir.Model, schemes: Schemes) -> list[_Weight]:
    """The block's matrices, each with an initializer of its own, biases as well."""
    found = []
    for linear in find_linears(model.graph):
        if linear.transposed:
            continue
        own_initializer(model, linear.node, 1)
        bias = None if linear.add is None else own_initializer(model, linear.add, 1)
        name = None if bias is None else str(bias.name)
        found.append(_Weight(linear, str(linear.weight.name), schemes.get(linear.name), str(linear.x.name), name))
    return found
