"""Walks the quantised graph once and puts integer nodes beside every float one.

Each rule takes a node and gives its result in integers (``values.py``). A node without a rule, or that its rule
refuses, stays float: its operands are brought to real numbers in front of it and its results back to a grid where
integers read them on, and the place is told with the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompile.graph.edits import constant_array, naming
from qcompile.graph.provenance import layer_name, original_name
from qcompile.integer.emit import LIMIT, Emitter
from qcompile.integer.grids import Grids, caches, find_grids
from qcompile.integer.positions import factors
from qcompile.integer.values import Codes, Held, Rows, Sums, Wide
from qcompile.pipeline import Context

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)
SURE = 2**28  # a requantised number is not cut below it


class Refused(Exception):
    """A rule cannot bring its node to integers; the argument says why."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """positions: table rows of rotary embeddings; probability_bits: of attention's weights, 8 or 16"""

    positions: int = 4096
    probability_bits: int = 16


Rule = Callable[["Converter", ir.Node], None]


class Converter:
    """What every value has become so far."""

    def __init__(self, model: ir.Model, ctx: Context, grids: Grids, settings: Settings) -> None:
        self.model, self.ctx, self.grids, self.settings = model, ctx, grids, settings
        self.emit = Emitter(model, ctx.workspace)
        self.held: dict[int, Held] = {}
        self.keys = settings.positions * (2 if caches(model.graph) else 1)  # that a query may attend to
        self.floats: list[tuple[ir.Node, str]] = []  # that stayed float, and why
        self._real: dict[int, ir.Value] = {}
        self._turns: dict[int, ir.Value] = {}

    # ----------------------------------------------------------------------- reading

    def get(self, value: ir.Value | None) -> Held:
        """What ``value`` has become; Refused where it is a float that no rule has made."""
        assert value is not None
        held = self.held.get(id(value))
        if held is None:
            raise Refused(f"it reads the float value '{value.name}'")
        return held

    def wide(self, value: ir.Value | None) -> Wide:
        """``value`` on its own grid."""
        assert value is not None
        held = self.held.get(id(value))
        if held is None:
            held = self._entered(value)
        if isinstance(held, Sums):
            held = self.scaled(held, value)
        if not isinstance(held, Wide):
            raise Refused(f"'{value.name}' is {type(held).__name__.lower()}, not numbers on a grid")
        self.held[id(value)] = held
        return held

    def constant(self, value: ir.Value | None, places: int) -> ir.Value:
        """The float constant ``value`` on a grid; Refused where the grid does not reach so far."""
        array = constant_array(value)
        assert array is not None and value is not None
        codes = np.rint(array.astype(np.float64) * 2.0**places)
        if not np.abs(codes).max(initial=0) < LIMIT:  # NaN neither
            raise Refused(f"the constant '{value.name}' is larger than anything that calibration saw beside it")
        return self.emit.int32(codes.astype(np.int32), f"{value.name}.integer")

    def operand(self, value: ir.Value | None, places: int, bound: int) -> ir.Value:
        """``value``, constant or not, on another grid."""
        if constant_array(value) is not None:
            return self.constant(value, places)
        return self.emit.rescaled(self.wide(value), places, bound).value

    def turn(self, value: ir.Value) -> ir.Value:
        """The cosines or sines ``value``, which every layer reads, from one table; positions.NoTable where none is."""
        if id(value) not in self._turns:
            self._turns[id(value)] = factors(value, self.emit, self.settings.positions)
        return self._turns[id(value)]

    def places(self, value: ir.Value) -> int:
        found = self.grids.places.get(str(value.name))
        if found is None:
            raise Refused(f"calibration has not seen '{value.name}'")
        return found

    def bound(self, value: ir.Value) -> int:
        return self.grids.bound(str(value.name))

    # ----------------------------------------------------------------------- making

    def put(self, node: ir.Node, value: ir.Value, bound: int, places: int | None = None) -> None:
        """Note ``value`` as the integers of the first output of ``node``."""
        result = node.outputs[0]
        value.shape = result.shape
        self.held[id(result)] = Wide(value, self.places(result) if places is None else places, bound)

    def scaled(self, sums: Sums, value: ir.Value) -> Wide:
        """``sums`` on the grid of ``value``."""
        places, bound = self.places(value), self.bound(value)
        if sums.rows is None:
            made = self.emit.requantize(sums.value, sums.bound, sums.factor * 2.0**places, -bound, bound)
            return Wide(made, places, bound)
        return Wide(self._scaled_rows(sums, sums.rows, places, bound), places, bound)

    def _scaled_rows(self, sums: Sums, rows: Rows, places: int, bound: int) -> ir.Value:
        """In two steps: by the columns' factors to nearly 28 bits, then by each row's step, and to the grid.

        Sums that are larger than likely saturate.

        What the first step leaves out is put back behind the second for rows that are large, where their last bits do
        not count, and in it for all others.
        """
        emit = self.emit
        scale = sums.factor * 2.0 ** (places - rows.places + 33 - rows.bits)
        reach = sums.likely * float(np.abs(scale).max())
        excess = max(0, math.ceil(math.log2(reach / SURE))) if reach else 0
        most = LIMIT - 1
        middle = emit.requantize(sums.value, sums.bound, scale / 2.0**excess, -most, most)
        if not excess:
            return emit.put("Requantize", [middle, rows.step, rows.divisor], low=-bound, high=bound)
        end, power = bound >> excess, emit.int32(2**excess)
        coarse = emit.put("Requantize", [middle, rows.step, rows.divisor], low=-end, high=end)
        less = emit.put("Max", [emit.put("Div", [rows.divisor, power]), emit.int32(1)])
        fine = emit.put("Requantize", [middle, rows.step, less], low=-bound, high=bound)
        large = emit.put("Less", [rows.divisor, power], ir.DataType.BOOL)
        return emit.put("Where", [large, emit.put("Mul", [coarse, power]), fine])

    def _entered(self, value: ir.Value) -> Wide:
        """A float value that comes from outside, rounded to its grid."""
        if value.dtype not in FLOATS:
            raise Refused(f"'{value.name}' is no float")
        places, bound = self.places(value), self.bound(value)
        step = self.emit.constant(np.asarray(2.0**places, np.float32), "step")
        ends = [self.emit.constant(np.asarray(end, np.float32), "end") for end in (-bound, bound)]
        real = ir.DataType.FLOAT
        scaled = self.emit.put("Mul", [value, step], real)
        inside = self.emit.put("Clip", [scaled, *ends], real)
        self._real[id(value)] = value  # who reads floats goes on reading it
        codes = self.emit.cast(self.emit.put("Round", [inside], real), ir.DataType.INT32)
        return Wide(self.emit.clip(codes, -bound, bound), places, bound)  # NaN is any integer

    def release(self, value: ir.Value, reader: ir.Node | None) -> None:
        """Let the rounding of tokens stay float, for a reader that takes no codes."""
        node = value.producer()
        assert node is not None
        place = node.inputs[0]
        if id(place) in self.held and place is not None:
            now, self.emit.node = self.emit.node, node
            node.replace_input_with(0, self.real(place))
            self.emit.node = now
        what = f"{reader.op_type} of '{layer_name(reader)}'" if reader is not None else "an output"
        if all(other is not node for other, _ in self.floats):
            self.floats.append((node, f"{what} reads it as floats"))

    def left(self, before: list[ir.Node]) -> list[tuple[ir.Node, str]]:
        """Float nodes of the model that a float node behind them keeps, although each has an integer form."""
        known = {id(node) for node, _ in self.floats}
        kept = [n for n in before if n.graph is not None and id(n) not in known and _has_floats(n)]
        kept = [node for node in kept if node.op_type not in ("Shape", "Size")]
        return [(node, "what stays float reads it") for node in kept]

    def real(self, value: ir.Value) -> ir.Value:
        """``value`` as floats, for a node that stays float or an output."""
        held = self.held.get(id(value))
        if held is None:
            return value
        if id(value) not in self._real:
            if isinstance(held, Codes):
                self._real[id(value)] = self.emit.float_of_codes(held)
            else:
                self._real[id(value)] = self.emit.float_of(self.wide(value))
        return self._real[id(value)]


def convert(model: ir.Model, ctx: Context, settings: Settings, rules: dict[str, Rule]) -> Converter:
    """Bring ``model`` to integers in place, as far as there are ``rules`` by operator."""
    grids = find_grids(ctx, model)
    converter = Converter(model, ctx, grids, settings)
    before = list(model.graph)
    with naming(model):
        for node in before:
            converter.emit.node = node
            _convert_node(converter, node, rules)
        _give_out(converter)
    model.graph.sort()
    common.RemoveUnusedNodesPass()(model)
    converter.floats = [*converter.left(before), *((n, why) for n, why in converter.floats if n.graph is not None)]
    for node, why in converter.floats:
        ctx.ledger.skip(layer_name(node), f"{node.op_type} stays float: {why}", original_name(node))
    return converter


def _has_floats(node: ir.Node) -> bool:
    return any(v is not None and v.dtype in FLOATS for v in (*node.inputs, *node.outputs))


def _convert_node(converter: Converter, node: ir.Node, rules: dict[str, Rule]) -> None:
    rule = rules.get(node.op_type)
    if not _has_floats(node) or all(constant_array(v) is not None for v in node.outputs):
        return
    if rule is None:
        _stay_float(converter, node, "it has no integer form")
        return
    try:
        rule(converter, node)
    except Refused as error:
        _stay_float(converter, node, str(error))


def _stay_float(converter: Converter, node: ir.Node, why: str) -> None:
    """Leave ``node``; what it reads in integers is brought back to real numbers."""
    for index, value in enumerate(node.inputs):
        held = converter.held.get(id(value)) if value is not None else None
        if isinstance(held, Wide | Sums | Codes):
            node.replace_input_with(index, converter.real(value))  # type: ignore[arg-type]
        elif isinstance(held, Rows):
            converter.release(value, node)  # type: ignore[arg-type]
    converter.floats.append((node, why))


def _give_out(converter: Converter) -> None:
    """Let the outputs of the graph come from integers."""
    graph = converter.model.graph
    for place, value in enumerate(graph.outputs):
        held = converter.held.get(id(value))
        if isinstance(held, Rows):
            converter.release(value, None)
        node = value.producer()
        if node is None or not isinstance(held, Wide | Sums | Codes):
            continue
        converter.emit.node = node
        made = converter.real(value)
        if made is value:
            continue
        name, made.shape, made.type = value.name, value.shape, value.type
        made.metadata_props.update(value.metadata_props)
        value.name, made.name = f"{name}.float", name
        graph.outputs[place] = made
