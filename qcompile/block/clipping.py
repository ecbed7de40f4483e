"""Learn the clips of all weights of one block together, through its activations' quantisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import overload

import numpy as np
import onnx_ir as ir
import torch

from qcompile.block.fx import TorchGraph, to_torch
from qcompile.block.learn import Example, Group, Outcome, Plan, Tensors, best_device, learn
from qcompile.block.quantisers import WeightClip
from qcompile.block.stream import Step
from qcompile.graph.canonical import match
from qcompile.graph.edits import unique_name
from qcompile.graph.linears import Linear
from qcompile.quant.clips import groups_of, search_clips
from qcompile.quant.numerics import QuantizedWeight, code_range, quantize_weight
from qcompile.quant.schemes import WeightScheme

Formats = Sequence[tuple[Linear, WeightScheme]]


def learn_clips(
    step: Step, formats: Formats, rate: float, plan: Plan, label: str
) -> tuple[Outcome, list[QuantizedWeight]]:
    """The codes of the weights of ``formats``, the block's linears with one matrix each, and how learning went.

    The clips start where plain rounding or a finer search puts them, whichever the block's output says is better.
    Raises UserError when an operator of the block cannot be learned through.
    """
    model = step.quantised()
    names = _read_floats(model, [linear for linear, _ in formats])
    graph, device = to_torch(model, step.name), best_device()
    graph.module.to(device)
    examples = _Examples(step)
    energies = _energies(to_torch(model, step.name), model, examples)
    clips: dict[str, WeightClip] = {}

    def change() -> Tensors:
        return {name: clip(graph.constant(name)) for name, clip in clips.items()}

    def run(changed: Tensors, inputs: Tensors) -> torch.Tensor:
        return graph.run(inputs, changed)[step.part.output]

    def learned(start: _Start, plan: Plan) -> Outcome:
        for name, (linear, scheme) in zip(names, formats, strict=True):
            clips[name] = _started(linear, scheme, start(linear, scheme, energies.get(name))).to(device)
        group = Group([parameter for clip in clips.values() for parameter in clip.parameters()], rate)
        return learn(change, run, [group], examples, plan, label, device)

    errors = [learned(start, dataclasses.replace(plan, epochs=0)).start for start in _STARTS]
    outcome = learned(_STARTS[int(np.argmin(errors))], plan)
    return outcome, [clip.codes(graph.constant(name)) for name, clip in clips.items()]


class _Examples(Sequence[Example]):
    """The block's samples, read when asked for."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def __len__(self) -> int:
        return len(self._step.targets)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return Example(self._step.feeds(number), [self._step.targets[number]], self._step.mask(number))


def _read_floats(model: ir.Model, linears: Sequence[Linear]) -> list[str]:
    """Let each of ``linears`` read its float matrix again in the quantised ``model``; the names of the matrices."""
    products = {str(value.name): node for node in model.graph for value in node.outputs}
    names = []
    for linear in linears:
        product = products[str(linear.node.outputs[0].name)]
        weight = linear.weight
        held = ir.Value(name=unique_name(model, str(weight.name)), const_value=weight.const_value)
        held.metadata_props.update(weight.metadata_props)
        model.graph.register_initializer(held)
        product.replace_input_with(1, held)
        names.append(str(held.name))
    return names


class _Energy(torch.nn.Module):
    """Sums the squares of what passes, over the tokens of ``mask``."""

    def __init__(self) -> None:
        super().__init__()
        self.total: torch.Tensor | None = None
        self.mask: np.ndarray | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fits = self.mask is not None and tuple(x.shape[:2]) == self.mask.shape
        rows = x[torch.from_numpy(np.array(self.mask)).to(x.device)] if fits else x.reshape(-1, x.shape[-1])
        squares = rows.double().square().sum(0)
        self.total = squares if self.total is None else self.total + squares
        return x


def _energies(graph: TorchGraph, model: ir.Model, examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """For each float matrix (K, N) that a product of ``graph`` reads, the energy (K,) of what it is multiplied with."""
    meters: dict[str, _Energy] = {}
    for node in model.graph:
        held = node.inputs[1] if node.op_type == "MatMul" else None
        if held is not None and held.is_initializer() and match.producer(node.inputs[0]) is not None:
            meter = meters.setdefault(str(held.name), _Energy())
            graph.read_through([(node, 0)], meter, f"energy_{len(meters)}")
    device = best_device()
    graph.module.to(device)
    with torch.no_grad():
        for example in examples:
            for meter in meters.values():
                meter.mask = example.mask
            graph.run({name: torch.from_numpy(np.array(array)).to(device) for name, array in example.inputs.items()})
    return {name: meter.total.float().cpu().numpy() for name, meter in meters.items() if meter.total is not None}


_Start = Callable[[Linear, WeightScheme, np.ndarray | None], tuple[np.ndarray, np.ndarray]]


def _searched(linear: Linear, scheme: WeightScheme, energy: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points (G, N) of the searched ends."""
    levels = search_clips(np.asarray(linear.w, np.float32), scheme, energy)
    return levels.scale, levels.zero_point


def _plain(linear: Linear, scheme: WeightScheme, energy: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points (G, N) that quantise chooses when it is left alone."""
    weight = quantize_weight(np.asarray(linear.w, np.float32), scheme, energy)
    return np.atleast_2d(weight.scale), np.atleast_2d(weight.zero_point.astype(np.int32))


_STARTS: tuple[_Start, ...] = (_plain, _searched)


def _started(linear: Linear, scheme: WeightScheme, grid: tuple[np.ndarray, np.ndarray]) -> WeightClip:
    """A clip that starts at the ends of ``grid``: scales and zero points (G, N)."""
    w, rows = np.asarray(linear.w, np.float32), groups_of(linear.rows, scheme)
    scale, zero = grid
    bounds = code_range(scheme.bits, scheme.symmetric, signed=True)
    ends = np.stack([(end - zero) * scale for end in bounds]).astype(np.float64)
    groups = [w[rows == number] for number in range(len(scale))]
    lows, highs = ([reach(group, axis=0) for group in groups] for reach in (np.min, np.max))
    extremes = np.stack([np.minimum(lows, 0), np.maximum(highs, 0)])
    fractions = np.divide(ends, extremes, out=np.ones_like(ends), where=extremes != 0)
    return WeightClip(linear.rows, linear.columns, scheme, fractions)
