"""Where a program is not integer: every tensor, constant and attribute of another type, and what may excuse it.

Only the shape of the graph excuses a float, never a name or metadata: it comes from a graph input and is made
integer, or it is made of integers and leaves as a graph output, with nothing but scaling and moving between.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from qcompile.proof import spans
from qcompile.proof.intervals import MOVES, STANDARD, Finding, finding

INTEGER, BOUNDARY, OPAQUE, FLOAT = "integer", "boundary", "opaque", "float"  # what a node may be

_STANDARD_DOMAINS = ("", "ai.onnx")
# Ends of an int8 program that hold floats inside: their operands are integers, their scales and sums are not.
_OPAQUE_NAMES = ("QLinear", "QGemm", "QAttention", "QOrdered", "QEmbed", "DynamicQuantize", "QMoE", "QuickGelu")
_OPAQUE = ("QuantizeLinear", "DequantizeLinear", "MatMulIntegerToFloat", "MatMulNBits", "QLinearMatMul", "QLinearConv")
_LEAVES = ("Cast", "DequantizeLinear")  # integer -> float
_FUSED_LEAVES = (*_LEAVES, "MatMulIntegerToFloat")  # what ONNX Runtime makes of MatMulInteger, Cast, Mul
_ENTERS = ("Cast", "QuantizeLinear", "Shape", "Size")  # float -> integer
_SCALING_IN = ("Cast", "Mul", "Clip", "Round")
_SCALING_OUT = ("Cast", "Mul", "Add", "Sub")
_FLOAT_ATTRIBUTES = (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS)
_TENSORS = (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS)
_SPARSE = (ir.AttributeType.SPARSE_TENSOR, ir.AttributeType.SPARSE_TENSORS)


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A float value at the boundary: ``side`` is "in" or "out", or "constant" for a scale there."""

    side: str
    value: str
    operator: str
    node: str


@dataclasses.dataclass
class Types:
    """What a graph holds: how many nodes of each kind, the floats at its boundary, and the findings.

    ``loose``: float inputs and constants that anything but an opaque operator reads.
    """

    kinds: dict[str, int]
    values: int
    loose: int
    boundary: list[Crossing]
    findings: list[Finding]
    extensions: dict[str, int]  # operators of other domains whose operands are all integer


def check_types(model: ir.Model, *, optimised: bool = False) -> Types:
    """Look at every value, constant and attribute of ``model`` (functions inlined, types inferred), subgraphs too."""
    graphs = [graph for graph in model.graphs() if isinstance(graph, ir.Graph)]
    edge = _Boundary(model.graph, _FUSED_LEAVES if optimised else _LEAVES)
    found = Types({INTEGER: 0, BOUNDARY: 0, OPAQUE: 0, FLOAT: 0}, 0, 0, [], [], {})
    extensions: collections.Counter[str] = collections.Counter()
    for graph in graphs:
        for value in _constants_and_inputs(graph):
            found.values += 1
            _check_value(value, None, edge, found)
        for node in graph:
            found.values += len(node.outputs)
            before = len(found.findings)
            for value in node.outputs:
                _check_value(value, node, edge, found)
            found.findings.extend(_float_attributes(node, edge))
            kind = _kind(node, edge, flagged=len(found.findings) > before)
            found.kinds[kind] += node.op_type != "Constant" or kind == FLOAT
            if kind == OPAQUE and _is_integer(node):
                extensions[f"{node.domain}.{node.op_type}" if node.domain else node.op_type] += 1
    found.extensions = dict(sorted(extensions.items()))
    return found


def _constants_and_inputs(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from (value for value in graph.initializers.values() if not value.is_graph_input())


def _check_value(value: ir.Value, node: ir.Node | None, edge: _Boundary, found: Types) -> None:
    if not value.name and not value.uses():
        return  # an optional output that is not asked for
    if value.dtype is None or value.dtype == ir.DataType.UNDEFINED or not isinstance(value.type, ir.TensorType):
        found.findings.append(finding("type", node, value, f"{_what(value, node)} has no known tensor type"))
    elif spans.is_integer(value.dtype):
        return
    elif value in edge.allowed:
        found.boundary.append(
            Crossing(edge.allowed[value], str(value.name), _op(node), "" if node is None else str(node.name))
        )
    else:
        found.loose += node is None and not _only_opaque(value)
        readers = edge.offenders(value)
        what = f"{_what(value, node)} is {value.dtype.name.lower()}"
        found.findings.append(finding("float", node, value, f"{what}{readers}"))


def _what(value: ir.Value, node: ir.Node | None) -> str:
    role = "output" if node is not None and node.op_type != "Constant" else "constant"
    if node is None and not value.is_initializer():
        role = "input"
    return f"{role} '{value.name}'"


def _op(node: ir.Node | None) -> str:
    return "" if node is None else node.op_type


def _float_attributes(node: ir.Node, edge: _Boundary) -> Iterator[Finding]:
    for name, attribute in node.attributes.items():
        if node.op_type == "Constant" and node.outputs[0] in edge.allowed:
            continue
        if attribute.is_ref():
            yield finding("type", node, None, f"attribute '{name}' refers to a function's attribute")
        elif attribute.type in _FLOAT_ATTRIBUTES:
            yield finding("float", node, None, f"attribute '{name}' is {attribute.value}, a float")
        elif attribute.type in _SPARSE:
            yield finding("type", node, None, f"attribute '{name}' is a sparse tensor")
        elif attribute.type in _TENSORS:
            held = attribute.as_tensors() if attribute.type == ir.AttributeType.TENSORS else [attribute.as_tensor()]
            if any(not spans.is_integer(tensor.dtype) for tensor in held):
                yield finding("float", node, None, f"attribute '{name}' is a tensor of floats")


def float_attributes_of(node: ir.Node) -> bool:
    """Whether ``node`` (a call of a function) is given a float."""
    return any(attribute.type in _FLOAT_ATTRIBUTES for attribute in node.attributes.values())


def _is_integer(node: ir.Node) -> bool:
    values = (*(value for value in node.inputs if value is not None), *node.outputs)
    return all(spans.is_integer(value.dtype) for value in values if value.name or value.uses())


def _is_opaque(node: ir.Node) -> bool:
    return node.op_type in _OPAQUE or node.op_type.startswith(_OPAQUE_NAMES)


def _only_opaque(value: ir.Value) -> bool:
    """Whether nothing but opaque operators reads ``value``: their scales are theirs."""
    return bool(value.uses()) and all(_is_opaque(node) for node, _ in value.uses())


def _kind(node: ir.Node, edge: _Boundary, flagged: bool) -> str:
    if node in edge.nodes:
        return BOUNDARY
    if node.op_type == "Constant":
        flagged = flagged and not _only_opaque(node.outputs[0])
        return FLOAT if flagged else INTEGER
    if _is_opaque(node):
        return OPAQUE
    if flagged or not _is_integer(node):
        return FLOAT
    is_standard = node.domain in _STANDARD_DOMAINS and node.op_type in STANDARD
    return INTEGER if is_standard else OPAQUE


class _Boundary:
    """The floats of the main graph that its shape excuses: ``allowed`` maps them to their side; their ``nodes``."""

    def __init__(self, graph: ir.Graph, leaves: tuple[str, ...]) -> None:
        self._graph, self._leaves = graph, leaves
        self._outputs = set(graph.outputs)
        self.allowed: dict[ir.Value, str] = {}
        self.nodes: set[ir.Node] = set()
        order = list(graph)
        entering = self._entering(order)
        leaving = self._leaving(order)
        for node in reversed(order):
            for value in node.outputs:
                self._excuse(value, entering, leaving)
        for value in graph.inputs:
            self._excuse(value, entering, leaving)
        self._collect_nodes(order, entering, leaving)
        for value in self._float_constants(order):
            if value.uses() and all(self._is_scale(node, place) for node, place in value.uses()):
                self.allowed[value] = "constant"

    def offenders(self, value: ir.Value) -> str:
        """The readers that make a float of it, for the text of a finding."""
        names = [f"{node.op_type} '{node.name}'" for node, _ in value.uses() if node not in self.nodes]
        return f", read by {', '.join(names[:2])}" if names else ""

    def _entering(self, order: list[ir.Node]) -> set[ir.Value]:
        """Floats that inputs reach by scaling and moving."""
        reached = {v for v in self._graph.inputs if _is_float(v) and not v.is_initializer()}
        for node in order:
            data = _data_operand(node, _SCALING_IN)
            if data is not None and node.inputs[data] in reached:
                reached.update(value for value in node.outputs if _is_float(value))
        return reached

    def _leaving(self, order: list[ir.Node]) -> set[ir.Value]:
        """Floats that are made of integers, and those that they reach by scaling and moving."""
        reached: set[ir.Value] = set()
        for node in order:
            data = _data_operand(node, _SCALING_OUT)
            crosses = node.op_type in self._leaves and _reads_integers(node)
            if crosses or (data is not None and node.inputs[data] in reached):
                reached.update(value for value in node.outputs if _is_float(value))
        return reached

    def _excuse(self, value: ir.Value, entering: set[ir.Value], leaving: set[ir.Value]) -> None:
        """Readers come first (the order is reversed), so that a chain is excused from its end."""
        uses = list(value.uses())
        ends_in = value not in self._outputs and (uses or value.is_graph_input())
        ends_out = value in self._outputs or uses
        if value in entering and ends_in and all(self._enters(*use) for use in uses):
            self.allowed[value] = "in"
        elif value in leaving and ends_out and all(self._passes(*use, _SCALING_OUT, "out") for use in uses):
            self.allowed[value] = "out"

    def _enters(self, node: ir.Node, place: int) -> bool:
        """Whether ``node`` makes its input ``place`` integer, or hands it on to such a node."""
        crosses = node.graph is self._graph and node.op_type in _ENTERS and _is_standard(node) and place == 0
        if crosses and spans.is_integer(node.outputs[0].dtype):
            return True
        return self._passes(node, place, _SCALING_IN, "in")

    def _passes(self, node: ir.Node, place: int, scaling: tuple[str, ...], side: str) -> bool:
        if node.graph is not self._graph or _data_operand(node, scaling) != place:
            return False
        return all(self.allowed.get(value) == side for value in node.outputs)

    def _collect_nodes(self, order: list[ir.Node], entering: set[ir.Value], leaving: set[ir.Value]) -> None:
        for node in order:
            made = any(value in self.allowed for value in node.outputs)
            crosses = node.op_type in _ENTERS and bool(node.inputs) and self.allowed.get(node.inputs[0]) == "in"  # type: ignore[arg-type]
            if made or crosses:
                self.nodes.add(node)

    def _float_constants(self, order: list[ir.Node]) -> Iterator[ir.Value]:
        yield from (value for value in self._graph.initializers.values() if _is_float(value))
        yield from (n.outputs[0] for n in order if n.op_type == "Constant" and _is_float(n.outputs[0]))

    def _is_scale(self, node: ir.Node, place: int) -> bool:
        """Whether a boundary node reads a constant at ``place`` as its scale or offset, not as its data."""
        if node not in self.nodes:
            return False
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return place > 0
        if node.op_type == "MatMulIntegerToFloat":
            return place > 1
        scaling = (*_SCALING_IN, *_SCALING_OUT)
        return node.op_type in scaling and _data_operand(node, scaling) != place


def _is_standard(node: ir.Node) -> bool:
    return node.domain in _STANDARD_DOMAINS


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _reads_integers(node: ir.Node) -> bool:
    """Whether the data of a node that leaves the integers is integer."""
    count = 2 if node.op_type == "MatMulIntegerToFloat" else 1
    return all(value is not None and spans.is_integer(value.dtype) for value in node.inputs[:count])


def _data_operand(node: ir.Node, scaling: tuple[str, ...]) -> int | None:
    """Which input of a scaling or moving node is data: the one that is no constant; None for other nodes."""
    if not _is_standard(node) or node.op_type not in (*scaling, *MOVES) or not node.inputs:
        return None
    if node.op_type in ("Cast", "Round", *MOVES):
        return 0 if node.op_type not in ("Concat", "Pad", "Trilu") else None
    constant = [value is not None and _is_constant(value) for value in node.inputs]
    return None if all(constant) or not any(constant) else constant.index(False)


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    made = producer is not None and producer.op_type == "Constant" and producer.domain in _STANDARD_DOMAINS
    return made or (value.is_initializer() and not value.is_graph_input())
