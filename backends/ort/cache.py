"""A quantised key/value cache: codes with a scale and a zero point for each token and head.

    present = Concat(past, qcompile.FakeQuantizePerToken(new))          float, and read by the attention
        ->  present        u8 (B, H, P + S, d), or (B, H, P + S, d / 2) at 4 bits    Concat(past, codes of new)
            present_scale  float (B, H, P + S, 1)                                    Concat(past_scale, scale of new)
            present_zero_point  u8 (B, H, P + S, 1)
        and the attention reads (codes - zero point) * scale
New tokens may be quantised around a centre, Add(FakeQuantizePerToken(Sub(new, centre)), centre): the codes leave it
out, and for keys so does what the attention reads, since it moves all scores of a query alike.
Past and present are inputs and outputs under the names that they had, with two more beside each. New tokens are read
as the next step will read them, so that any split of a text gives the same. At 4 bits a byte holds channel i in its
low and channel i + d / 2 in its high half. Spelled in Cast, Sub and Mul, which take half the time of ONNX Runtime's
blocked DequantizeLinear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.emit import put_node
from qcompile.graph.caches import SCALE, ZERO_POINT, Cache, find_caches, is_of_keys
from qcompile.graph.canonical import match
from qcompile.graph.edits import naming, new_initializer
from qcompile.graph.provenance import inherit
from qcompile.graph.workspace import Workspace
from qcompile.ledger import Ledger
from qcompile.quant.numerics import SCALE_FLOOR

HALF_BYTE = 15  # levels of codes that share a byte


def rewrite(model: ir.Model, workspace: Workspace, ledger: Ledger) -> list[ir.Value]:
    """Turn every cache with quantised keys or values into codes; returns the values that the attentions read.

    ``cache_ports`` of the ledger names the inputs and outputs that are no longer what they were.
    """
    with naming(model):
        lowering = _Lowering(model, workspace)
        for cache in list(find_caches(model.graph)):
            quantiser = match.producer(_centred(cache.new), "FakeQuantizePerToken")
            if quantiser is not None:
                lowering.replace(cache, quantiser)
    if lowering.ports:
        ledger.current.facts["cache_ports"] = lowering.ports
    return lowering.read


@dataclasses.dataclass(frozen=True)
class _Codes:
    """Quantised tokens: codes (packed at 4 bits), scale and zero point."""

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value

    def parts(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        return self.codes, self.scale, self.zero


def _centred(value: ir.Value) -> ir.Value:
    """``value`` without the constant that is added to it at last, if one is."""
    add = match.producer(value, "Add")
    operands = match.constant_operand(add) if add is not None else None
    return value if operands is None else operands[0]


class _Lowering:
    def __init__(self, model: ir.Model, workspace: Workspace) -> None:
        self.model, self.workspace = model, workspace
        self.ports: list[str] = []
        self.read: list[ir.Value] = []

    def replace(self, cache: Cache, quantiser: ir.Node) -> None:
        levels, width = int(quantiser.attributes["levels"].as_float()), cache.width
        assert width is not None
        new = self._quantised(quantiser, levels)
        past = self._past(cache, levels, width)
        self._sizes(cache, past.codes, width)
        present = self._present(cache, past, new)
        whole = self._dequantised(cache, present, levels)
        centred = _centred(cache.new)
        add = cache.new.producer()
        if centred is not cache.new and add is not None and not is_of_keys(cache):
            whole = self._put(cache.node, "Add", [whole, match.other_operand(add, centred)])
        old = cache.present
        old.replace_all_uses_with(whole)  # the graph's output is the codes already
        match.remove_dead(self.model.graph, [cache.node])
        self.read.append(whole)

    # ----------------------------------------------------------------- inputs and outputs

    def _past(self, cache: Cache, levels: int, width: int) -> _Codes:
        """The past as inputs of the graph: codes in place of the float ones, scale and zero point behind them."""
        assert cache.past.shape is not None
        sides, name = list(cache.past.shape)[:3], cache.name
        byte = width // 2 if levels == HALF_BYTE else width
        made = [_port(n, kind, [*sides, last]) for n, kind, last in _ports(name, byte)]
        inputs = self.model.graph.inputs
        place = inputs.index(cache.past)
        cache.past.name = f"{name}.float"
        inputs[place : place + 1] = made
        self.ports += [str(value.name) for value in made]
        return _Codes(*made)

    def _sizes(self, cache: Cache, codes: ir.Value, width: int) -> None:
        """Let those that read the shape of the past read that of its codes, with ``width`` for the last axis."""
        for node in [user for user in match.consumers(cache.past) if user.op_type == "Shape"]:
            span = [ir.AttrInt64("start", 0), ir.AttrInt64("end", 3)]
            sides = put_node(node, "", "Shape", [codes], f"{node.outputs[0].name}.sides", span).outputs[0]
            last = self._constant("width", np.array([width]))
            whole = self._put(node, "Concat", [sides, last], [ir.AttrInt64("axis", 0)])
            start, end = (match.int_attribute(node, key, at) for key, at in (("start", 0), ("end", 4)))
            ends = [self._constant("end", np.array([n])) for n in (start, end)]
            match.put_instead(node, match.new_node("", "Slice", [whole, *ends], {}, [node]))

    def _present(self, cache: Cache, past: _Codes, new: _Codes) -> _Codes:
        assert cache.present.shape is not None
        sides, name = list(cache.present.shape)[:3], str(cache.present.name)
        cache.present.name = f"{name}.float"
        made = []
        for (port, kind, _), before, after in zip(_ports(name, 1), past.parts(), new.parts(), strict=True):
            node = put_node(cache.node, "", "Concat", [before, after], port, [ir.AttrInt64("axis", 2)])
            value = node.outputs[0]
            assert before.shape is not None
            value.type, value.shape = ir.TensorType(kind), ir.Shape([*sides, before.shape[3]])
            made.append(value)
        outputs = self.model.graph.outputs
        place = outputs.index(cache.present)
        outputs[place : place + 1] = made
        self.ports += [str(value.name) for value in made]
        return _Codes(*made)

    # ----------------------------------------------------------------- arithmetic of the function

    def _quantised(self, node: ir.Node, levels: int) -> _Codes:
        """Codes of the new tokens x, (B, H, S, d)."""
        x = node.inputs[0]
        last, nought = self._constant("last", np.array([-1], np.int64)), self._number(0.0)
        high = self._put(node, "Max", [self._put(node, "ReduceMax", [x, last]), nought])
        low = self._put(node, "Min", [self._put(node, "ReduceMin", [x, last]), nought])
        step = self._put(node, "Div", [self._put(node, "Sub", [high, low]), self._number(levels)])
        scale = self._put(node, "Max", [step, self._number(SCALE_FLOOR)])
        first = self._put(node, "Round", [self._put(node, "Div", [low, scale])])
        steps = self._put(node, "Round", [self._put(node, "Div", [x, scale])])
        raised = self._put(node, "Sub", [steps, first])
        codes = self._put(node, "Clip", [raised, nought, self._number(levels)])
        zero = self._cast(node, self._put(node, "Neg", [first]), ir.DataType.UINT8)
        packed = self._packed(node, codes) if levels == HALF_BYTE else codes
        return _Codes(self._cast(node, packed, ir.DataType.UINT8), scale, zero)

    def _packed(self, node: ir.Node, codes: ir.Value) -> ir.Value:
        """Two codes in one number: low + 16 high."""
        attributes = [ir.AttrInt64("axis", -1), ir.AttrInt64("num_outputs", 2)]
        split = inherit(ir.Node("", "Split", [codes], attributes, num_outputs=2), node)
        assert node.graph is not None
        node.graph.insert_before(node, split)
        for half, name in zip(split.outputs, ("low", "high"), strict=True):
            half.name = f"{node.outputs[0].name}.{name}"
        low, high = split.outputs
        return self._put(node, "Add", [low, self._put(node, "Mul", [high, self._number(16.0)])])

    def _dequantised(self, cache: Cache, present: _Codes, levels: int) -> ir.Value:
        node, codes = cache.node, present.codes
        if levels == HALF_BYTE:
            low = self._put(node, "BitwiseAnd", [codes, self._constant("low", np.uint8(HALF_BYTE))])
            right = [ir.AttrString("direction", "RIGHT")]
            high = self._put(node, "BitShift", [codes, self._constant("bits", np.uint8(4))], right)
            codes = self._put(node, "Concat", [low, high], [ir.AttrInt64("axis", -1)])
        numbers = [self._cast(node, x, ir.DataType.FLOAT) for x in (codes, present.zero)]
        whole = self._put(node, "Mul", [self._put(node, "Sub", numbers), present.scale])
        whole.type, whole.shape = cache.new.type, cache.present.shape
        return whole

    def _cast(self, node: ir.Node, value: ir.Value, kind: ir.DataType) -> ir.Value:
        return self._put(node, "Cast", [value], [ir.AttrInt64("to", int(kind))])

    def _number(self, number: float) -> ir.Value:
        return self._constant("number", np.float32(number))

    def _constant(self, name: str, array: np.ndarray | np.generic) -> ir.Value:
        return new_initializer(self.model, name, np.asarray(array), self.workspace)

    def _put(
        self, node: ir.Node, op: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr] = ()
    ) -> ir.Value:
        return put_node(node, "", op, inputs, f"{node.outputs[0].name}.{op}", attributes).outputs[0]


def _ports(name: str, byte: int) -> list[tuple[str, ir.DataType, int]]:
    """(name, type, last axis) of codes, scales and zero points."""
    return [
        (name, ir.DataType.UINT8, byte),
        (f"{name}{SCALE}", ir.DataType.FLOAT, 1),
        (f"{name}{ZERO_POINT}", ir.DataType.UINT8, 1),
    ]


def _port(name: str, kind: ir.DataType, sides: list[object]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(sides))  # type: ignore[arg-type]
