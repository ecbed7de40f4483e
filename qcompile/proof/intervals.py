"""Between which integers every value of a program lies: the proof that nothing in it overflows.

Each operator has a rule that maps the exact ends of its inputs to those of its outputs. The analysis knows no
relation between tensors but a few that integer code lives on (``x - x % c``, ``x - (x / c) * c``, ``x - max(x)``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from qcompile.errors import unknown_name
from qcompile.graph.provenance import layer_name, original_name
from qcompile.proof import arithmetic, cuts, fresh, lookup, moves, spans, sums
from qcompile.proof.spans import Dim, Dims, Span, exactly
from qcompile.proof.step import Rule, Step, UnreadableError

MOVES: dict[str, Rule] = {**moves.RULES, **cuts.RULES}
RULES: dict[str, Rule] = {**arithmetic.RULES, **sums.RULES, **lookup.RULES, **MOVES, **fresh.RULES}
BRANCHES = "If"
STANDARD = frozenset({*RULES, BRANCHES})  # the operators of a program of grade A
_MOVED = frozenset({*MOVES, "Cast"})  # what comes out is what went in
_COMPUTED = frozenset({*arithmetic.RULES, *sums.RULES}) - {"Where", "Cast", "Max", "Min"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """What keeps a program from being proven; ``node`` and ``value`` in the user's names."""

    kind: str
    node: str
    operator: str
    value: str
    layer: str
    text: str
    hint: str = ""


def finding(kind: str, node: ir.Node | None, value: ir.Value | None, text: str, hint: str = "") -> Finding:
    """A finding at ``node`` (or at a value that no node makes)."""
    return Finding(
        kind,
        "" if node is None else original_name(node),
        "" if node is None else node.op_type,
        "" if value is None else original_name(value),
        "" if node is None else layer_name(node),
        text,
        hint,
    )


@dataclasses.dataclass
class OperatorBounds:
    """What all nodes of one operator make: values in ``lo..hi``; ``proven`` of the ``nodes`` have no complaint."""

    nodes: int = 0
    proven: int = 0
    lo: int = 0
    hi: int = 0

    def add(self, made: Sequence[Span], proven: bool) -> None:
        self.nodes += 1
        self.proven += proven
        for one in made if proven else ():
            if spans.is_integer(one.dtype):
                self.lo, self.hi = min(self.lo, one.least), max(self.hi, one.most)


@dataclasses.dataclass(frozen=True)
class Peak:
    """The computed int32 value that comes nearest to overflowing: ``share`` = its size / 2^31."""

    share: float = 0.0
    node: str = ""
    operator: str = ""
    layer: str = ""


@dataclasses.dataclass
class Intervals:
    """The outcome: the span of every value, what is assumed of the caller, and every complaint."""

    spans: dict[ir.Value, Span] = dataclasses.field(default_factory=dict)
    operators: dict[str, OperatorBounds] = dataclasses.field(default_factory=dict)
    peak: Peak = dataclasses.field(default_factory=Peak)
    assumptions: dict[str, None] = dataclasses.field(default_factory=dict)  # in order, each once
    findings: list[Finding] = dataclasses.field(default_factory=list)


def dims_of_inputs(model: ir.Model) -> list[str]:
    """The dynamic dims that ``--bound`` may name; one without a name is called ``input.axis``."""
    names: dict[str, None] = {}
    for value in _fed(model.graph):
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int):
                names[_dim_name(value, axis, size)] = None
    return list(names)


def check_bounds(model: ir.Model, bounds: Mapping[str, int]) -> None:
    """UserError where ``bounds`` names what is no dynamic dim of an input."""
    known = dims_of_inputs(model)
    for name in bounds:
        if name not in known:
            raise unknown_name("dynamic dim", name, known or ["no dim of the model is dynamic"])


def find_intervals(model: ir.Model, bounds: Mapping[str, int]) -> Intervals:
    """Analyse ``model``: functions inlined, sorted, types and shapes inferred; ``bounds``: largest sizes of dims."""
    walk = _Walk(bounds, _rows(model.graph))
    for value in _fed(model.graph):
        walk.found.spans[value] = spans.full(value.dtype, walk.input_dims(value), source=str(value.name))
    walk.graph(model.graph)
    return walk.found


def _fed(graph: ir.Graph) -> list[ir.Value]:
    return [value for value in graph.inputs if not value.is_initializer()]


def _rows(graph: ir.Graph) -> set[str]:
    """The names of the first axes of the inputs: nobody runs a program on no row."""
    shapes = [(value, value.shape[0]) for value in _fed(graph) if value.shape]
    return {_dim_name(value, 0, size) for value, size in shapes if not isinstance(size, int)}


def _dim_name(value: ir.Value, axis: int, size: object) -> str:
    named = size.value if isinstance(size, ir.SymbolicDim) else None
    return str(named) if named else f"{value.name}.{axis}"


class _Walk:
    def __init__(self, bounds: Mapping[str, int], rows: Collection[str]) -> None:
        self.bounds, self._rows = bounds, rows
        self.found = Intervals()

    def input_dims(self, value: ir.Value) -> Dims | None:
        if value.shape is None:
            return None
        names = [(size, _dim_name(value, axis, size)) for axis, size in enumerate(value.shape)]
        return tuple(exactly(size) if isinstance(size, int) else self.named(name) for size, name in names)

    def named(self, name: str) -> Dim:
        bound = self.bounds.get(name)
        if name in self._rows:
            self.found.assumptions[f"inputs have at least one row: '{name}' is not 0"] = None
        least = 1 if name in self._rows else 0
        return Dim(least, bound, frozenset() if bound is not None else frozenset([name]), name)

    def inferred(self, value: ir.Value) -> Dims | None:
        """What type inference says; a name that it made up says nothing."""
        if value.shape is None:
            return None
        return tuple(exactly(size) if isinstance(size, int) else self.meant(size) for size in value.shape)

    def meant(self, size: ir.SymbolicDim) -> Dim:
        name = size.value
        return self.named(name) if isinstance(name, str) and name in self.bounds else Dim()

    def graph(self, graph: ir.Graph) -> None:
        for value in graph.initializers.values():
            tensor = value.const_value
            if value.is_graph_input():
                self.found.assumptions[f"constant '{value.name}' is not fed as an input"] = None
            if tensor is None:
                self.found.findings.append(finding("operator", None, value, "an initializer without data"))
                self.found.spans[value] = spans.full(value.dtype, None)
            else:
                self.found.spans[value] = spans.constant(tensor.numpy(), tensor.dtype)
        for node in graph:
            self.node(node)

    def node(self, node: ir.Node) -> None:
        ins = [None if value is None else self.of(value) for value in node.inputs]
        step = Step(node, ins, [self.inferred(value) for value in node.outputs], self.found.spans)
        made = self.made(step)
        proven = not step.complaints
        for value, one, dims in zip(node.outputs, made, step.inferred, strict=True):
            self.found.spans[value] = _placed(node, one, dims, ins, proven)
        first = node.outputs[0] if node.outputs else None
        for complaint in step.complaints:
            self.found.findings.append(finding(complaint.kind, node, first, complaint.text, complaint.hint))
        self.found.assumptions.update(dict.fromkeys(step.assumptions))
        if node.op_type != "Constant":
            self.found.operators.setdefault(node.op_type, OperatorBounds()).add(made, proven)
        if proven:
            self.measure(node, step, made)

    def of(self, value: ir.Value) -> Span:
        return self.found.spans.get(value) or spans.full(value.dtype, None)

    def made(self, step: Step) -> list[Span]:
        """The spans of the outputs; anything at all, with a complaint, where the node cannot be analysed."""
        anything = [spans.full(v.dtype, d) for v, d in zip(step.node.outputs, step.inferred, strict=True)]
        if step.node.op_type == BRANCHES and step.node.domain in ("", "ai.onnx"):
            return self.branches(step) or anything
        rule = RULES.get(step.node.op_type) if step.node.domain in ("", "ai.onnx") else None
        if not _all_integer(step) and step.node.op_type not in (*_MOVED, *fresh.RULES):
            return [*anything]  # a boundary, or a float that the check of types names
        if rule is None:
            step.complain("operator", f"no interval rule for {_operator(step.node)}")
            return anything
        try:
            made = list(rule(step))
        except UnreadableError as error:
            step.complain("operator", f"{step.node.op_type} cannot be analysed: {error}")
            return anything
        except (ValueError, IndexError, TypeError, KeyError, AttributeError, AssertionError) as error:
            step.complain("operator", f"{step.node.op_type} is not well formed: {error}")  # of a file, not of ours
            return anything
        return made if len(made) == len(anything) else anything

    def branches(self, step: Step) -> list[Span] | None:
        """Both branches, joined."""
        graphs = [step.node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
        for graph in graphs:
            self.graph(graph)
        made = []
        for index, value in enumerate(step.node.outputs):
            ways = [self.found.spans.get(graph.outputs[index]) for graph in graphs]
            known = [way for way in ways if way is not None]
            if len(known) < 2 or len({way.dtype for way in known}) > 1:
                step.complain("operator", "a branch cannot be analysed")
                return None
            (alo, ahi), (blo, bhi) = spans.collapsed(known[0]), spans.collapsed(known[1])
            lo, hi = min(int(alo[0]), int(blo[0])), max(int(ahi[0]), int(bhi[0]))
            made.append(spans.between(value.dtype, step.inferred[index], lo, hi, spans.needs_of(known)))
        return made

    def measure(self, node: ir.Node, step: Step, made: Sequence[Span]) -> None:
        """Keep the peak: over int32 values that were computed."""
        for one in made:
            if one.dtype == ir.DataType.INT32 and node.op_type in _COMPUTED and _all_integer(step):
                share = max(-one.least, one.most) / 2**31
                if share > self.found.peak.share:
                    self.found.peak = Peak(share, original_name(node), node.op_type, layer_name(node))


def _all_integer(step: Step) -> bool:
    ins = (one.dtype for one in step.ins if one is not None)
    outs = (value.dtype for value in step.node.outputs)
    return all(map(spans.is_integer, (*ins, *outs)))


def _placed(node: ir.Node, one: Span, inferred: Dims | None, ins: Sequence[Span | None], proven: bool) -> Span:
    """``one`` with all that is known of its sizes, and with the input it was moved from."""
    dims = one.dims
    if dims is None or inferred is None or len(dims) != len(inferred):
        dims = inferred if dims is None else dims
    else:
        dims = tuple(spans.meet(a, b) for a, b in zip(dims, inferred, strict=True))
    moved = node.op_type in _MOVED and proven and ins and ins[0] is not None
    return dataclasses.replace(one, dims=dims, source=ins[0].source if moved else "")  # type: ignore[union-attr]


def _operator(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type
