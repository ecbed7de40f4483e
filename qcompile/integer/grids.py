"""The fixed-point grid of every float value: how many binary places it has.

Values that are only moved share one grid, and so do a sum and what is added where it is about as large, so that no
operator is spent between them; where a residual stream grows, by tokens a thousand times larger than the rest, its grid
grows with it. A grid holds what calibration saw with ``HEADROOM`` to spare; beyond that a value saturates, which is
what makes overflow impossible. A cache leaves the program and comes back as float32, which holds its numbers exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from qcompile.calibration.observers import not_finite
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.functions import is_op
from qcompile.pipeline import Context

MOVES = (
    "Reshape", "Transpose", "Identity", "Unsqueeze", "Squeeze", "Slice", "Split", "Expand", "Flatten", "Tile",
    "GatherND", "GatherElements",
)  # fmt: skip
KEPT = ("Clip", "ClipTokens", "Neg", "Gelu", "Silu", "Relu", "RotaryEmbedding")  # no larger than what they read
SAME = (*MOVES, *KEPT, "Add", "Sub", "Concat", "Where")
ATTENTIONS = ("Attention", "GroupedAttention")
WIDE_BITS, NARROW_BITS = 28, 15  # of the bound; narrow where a product with 14 places follows
CACHE_BITS = 24  # what float32 holds exactly
HEADROOM, NARROW_HEADROOM = 4.0, 2.0
ALIKE = 4.0  # a sum so many times larger than what is added has a grid of its own
MOST_PLACES, GATE_PLACES = 30, 24
TINY = 1e-9
MASK, MASKED = -1e9, -(2.0**16)  # what no score reaches, and what is as good a mask


@dataclasses.dataclass(frozen=True)
class Grids:
    """places and bits of the bound: by value name; extremes: (lo, hi) by value name, (H, d) for what an attention
    reads; without values that are empty on every sample."""

    places: dict[str, int]
    bits: dict[str, int]
    extremes: dict[str, tuple[np.ndarray, np.ndarray]]

    def bound(self, name: str) -> int:
        """What |value| of an int32 on the grid of ``name`` is kept below."""
        return int(2 ** self.bits.get(name, WIDE_BITS))


def data_operands(node: ir.Node) -> list[ir.Value]:
    """The operands of ``node`` that carry what the model computes: no mask, table of positions or constant."""
    count = 3 if is_op(node, *ATTENTIONS) else 1 if is_op(node, "RotaryEmbedding") else len(node.inputs)
    values = [v for v in node.inputs[:count] if v is not None]
    kind = ir.DataType.UINT8 if is_op(node, "DequantizeLinear") else ir.DataType.FLOAT
    return [v for v in values if v.dtype == kind and constant_array(v) is None]


def carried(graph: ir.Graph) -> list[ir.Value]:
    """The float values between inputs and outputs that are computed from data, in graph order."""
    wanted: set[int] = set()
    pending = [v for v in graph.outputs if v.dtype == ir.DataType.FLOAT]
    while pending:
        value = pending.pop()
        if id(value) in wanted:
            continue
        wanted.add(id(value))
        if (node := value.producer()) is not None:
            pending.extend(data_operands(node))
    found = [*graph.inputs, *(v for node in graph for v in node.outputs)]
    return [v for v in found if id(v) in wanted and v.dtype == ir.DataType.FLOAT]


def find_grids(ctx: Context, model: ir.Model) -> Grids:
    """Stream the samples once, and choose a grid for every value that carries data."""
    values = [v for v in carried(model.graph) if not _is_weight(v)]
    extremes = _extremes(ctx, model, [str(v.name) for v in values])
    groups = _Groups(
        values, {name: float(max(np.abs(lo).max(), np.abs(hi).max())) for name, (lo, hi) in extremes.items()}
    )
    narrow, kept = _narrow(values), caches(model.graph)
    places: dict[str, int] = {}
    bits: dict[str, int] = {}
    for group in groups.all():
        names = {str(v.name) for v in group}
        reach = max(TINY, *(float(np.abs(extremes[n]).max()) for n in names if n in extremes), TINY)
        most = min(_most_places(v) for v in group)
        width = NARROW_BITS if names & narrow else CACHE_BITS if names & kept else WIDE_BITS
        headroom = NARROW_HEADROOM if names & narrow else HEADROOM
        places |= dict.fromkeys(names, min(width - math.ceil(math.log2(reach * headroom)), most))
        bits |= dict.fromkeys(names, width)
    return Grids(places, bits, extremes)


def _extremes(ctx: Context, model: ir.Model, names: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(smallest, largest) of each value over the samples; of what an attention reads, by head and channel (H, d).

    They are found inside the graph: what would be fetched instead is every value of the model at once.
    """
    measured = model.clone()
    values = {v.name: v for v in (*measured.graph.inputs, *(v for node in measured.graph for v in node.outputs))}
    heads = {str(v.name) for node in measured.graph if is_op(node, *ATTENTIONS) for v in data_operands(node)}
    apart = new_initializer(measured, "tokens_of_heads", np.array([0, 2], np.int64), ctx.workspace)
    for name in names:
        value = values[name]
        for op in ("ReduceMin", "ReduceMax"):
            inputs = [value, apart] if name in heads else [value]
            node = ir.node(op, inputs, {"keepdims": 0})
            node.outputs[0].name, node.outputs[0].type = f"{name}.{op}", ir.TensorType(ir.DataType.FLOAT)
            measured.graph.append(node)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    wanted = [f"{name}.{op}" for name in names for op in ("ReduceMin", "ReduceMax")]
    for _, arrays in ctx.runner.stream(measured, ctx.samples, wanted, "calibrating"):
        for name in names:
            lo, hi = arrays[f"{name}.ReduceMin"], arrays[f"{name}.ReduceMax"]
            if (lo > hi).all():  # of no tokens
                continue
            if not (np.isfinite(lo).all() and np.isfinite(hi).all()):
                raise not_finite(model, name, np.stack([lo, hi]))
            known = found.get(name, (lo, hi))
            found[name] = np.minimum(known[0], lo), np.maximum(known[1], hi)
    return {name: (_without_mask(lo), _without_mask(hi)) for name, (lo, hi) in found.items()}


def _without_mask(extreme: np.ndarray) -> np.ndarray:
    """Scores with a mask of -1e38 in them, on a grid that holds that, would all be 0; less hides a token as well."""
    return np.where(extreme < MASK, MASKED, extreme)


def _is_weight(value: ir.Value) -> bool:
    node = value.producer()
    return is_op(node, "DequantizeLinear") and constant_array(node.inputs[0]) is not None  # type: ignore[union-attr]


def _most_places(value: ir.Value) -> int:
    """What the operators that read ``value`` take: GELU a unit below 2^25, a norm an epsilon below 2^29 units^2."""
    most = MOST_PLACES
    for node in (use.node for use in value.uses()):
        if is_op(node, "Gelu", "Silu", "Tanh", "Sigmoid"):
            most = min(most, GATE_PLACES)
        if is_op(node, "LayerNormalization", "RMSNormalization") and node.inputs[0] is value:
            most = min(most, math.floor((29 - math.log2(max(epsilon_of(node), 1e-30))) / 2))
    return most


def epsilon_of(node: ir.Node) -> float:
    """Of a norm; the default is ONNX's."""
    attribute = node.attributes.get("epsilon")
    return float(attribute.as_float()) if attribute is not None else 1e-5


def _narrow(values: Iterable[ir.Value]) -> set[str]:
    """The values that a rotary embedding reads or makes."""
    found = set()
    for value in values:
        node = value.producer()
        if is_op(node, "RotaryEmbedding"):
            found |= {str(value.name), str(node.inputs[0].name)}  # type: ignore[union-attr]
    return found


def caches(graph: ir.Graph) -> set[str]:
    """The outputs that continue an input."""
    outside = set(graph.inputs)
    joined = [v for v in graph.outputs if is_op(v.producer(), "Concat")]
    return {str(v.name) for v in joined if outside & set(v.producer().inputs)}  # type: ignore[union-attr]


def _times(reach: dict[str, float], total: ir.Value, part: ir.Value) -> float:
    """How many times larger ``total`` is; once where either was empty."""
    if str(total.name) not in reach or str(part.name) not in reach:
        return 1.0
    found, known = (max(reach[str(v.name)], TINY) for v in (total, part))
    return found / known


class _Groups:
    """Values that share a grid."""

    def __init__(self, values: list[ir.Value], reach: dict[str, float]) -> None:
        self._values = {id(v): v for v in values}
        self._parent = {key: key for key in self._values}
        for value in values:
            node = value.producer()
            if is_op(node, *SAME):
                most = ALIKE if is_op(node, "Add", "Sub", "Concat") else math.inf
                operands = [v for v in data_operands(node) if id(v) in self._values]  # type: ignore[arg-type]
                for operand in operands:
                    if is_op(operand.producer(), "MatMul") or _times(reach, value, operand) <= most:
                        self._parent[self._root(id(value))] = self._root(id(operand))

    def _root(self, key: int) -> int:
        while self._parent[key] != key:
            self._parent[key] = self._parent[self._parent[key]]
            key = self._parent[key]
        return key

    def all(self) -> list[list[ir.Value]]:
        found: dict[int, list[ir.Value]] = {}
        for key, value in self._values.items():
            found.setdefault(self._root(key), []).append(value)
        return list(found.values())
