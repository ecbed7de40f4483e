"""A transformer model cut into its blocks: sub-models that, run one after another, are the whole model.

The residual stream is the thread. A block begins at the value that reaches its end without passing one of its
linears, and ends where that value and all that its linears make have met again. What a block reads besides
(masks, cos and sin, an encoder's states) are further inputs, under the names that they have in the model.
Nothing is assumed about the architecture: post-LN, parallel branches, experts and cross attention come out of
the dataflow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from qcompile.errors import ContractError
from qcompile.graph.blocks import Block, find_blocks
from qcompile.graph.functions import is_op
from qcompile.graph.linears import find_linears
from qcompile.graph.provenance import layer_name, original_name

_FLOATS = (None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_WITH_SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of the model, by the names of its values, so that it outlives an edit of the graph inside it.

    needs: what it reads and does not make; gives: what others read, or the model gives out. A block's first of
    both is the residual stream.
    """

    name: str
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    is_block: bool

    @property
    def input(self) -> str:
        """The residual stream before the block."""
        return self.needs[0]

    @property
    def output(self) -> str:
        """The residual stream after the block."""
        return self.gives[0]

    @property
    def extra(self) -> tuple[str, ...]:
        """The block's inputs besides the residual stream."""
        return self.needs[1:]


@dataclasses.dataclass(frozen=True)
class Uncut:
    """A block that is no part of its own, why, and the node (the user's name) where that was seen."""

    name: str
    reason: str
    node: str


@dataclasses.dataclass(frozen=True)
class Cut:
    """All parts in the order in which they run: blocks, and what lies before, between and behind them."""

    parts: tuple[Part, ...]
    uncut: tuple[Uncut, ...]

    @property
    def blocks(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.is_block)


def cut(model: ir.Model) -> Cut:
    """``model`` in parts. The output of a block is the input of the next one of its stack."""
    view = _View(model.graph)
    linears = {id(linear.node) for linear in find_linears(model.graph)}
    tried = [_find_ends(view, block, linears) for block in find_blocks(model)]
    found = [one for one in tried if isinstance(one, _Ends)]
    uncut = [one for one in tried if isinstance(one, Uncut)]
    pieces, tangled = _pieces(view, _bounded(view, found))
    return Cut(tuple(_named(view, pieces)), tuple(uncut + tangled))


def extract(model: ir.Model, part: Part) -> ir.Model:
    """``part`` as a model of its own, with the weights that ``model`` has now (shared, not copied).

    Raises ContractError where an edit removed a value at the border of the part, or lets it read another one.
    """
    try:
        graph = ir.convenience.extract(model.graph, part.needs, part.gives)
    except ValueError as error:
        raise ContractError(f"the borders of '{part.name}' have moved: {error}", where=part.name) from error
    order = list(model.graph.initializers)
    held = sorted(graph.initializers.values(), key=lambda value: order.index(str(value.name)))
    graph.initializers.clear()
    for value in held:
        graph.register_initializer(value)
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


# --------------------------------------------------------------------------- the dataflow


class _View:
    """The graph as lists: what each node reads that is no constant, and who reads a value."""

    def __init__(self, graph: ir.Graph) -> None:
        self.outputs = list(graph.outputs)
        self.nodes = list(graph)
        self.place = {id(node): place for place, node in enumerate(self.nodes)}
        self.reads: dict[int, list[ir.Value]] = {}
        self.readers: dict[int, list[ir.Node]] = {}
        constant = {id(value) for value in graph.initializers.values() if not value.is_graph_input()}
        for node in self.nodes:
            every = list(_all_reads(node))
            reads = [value for value in every if id(value) not in constant]
            self.reads[id(node)] = reads
            if not reads and (every or is_op(node, "Constant")):
                constant.update(id(value) for value in node.outputs)
            for value in reads:
                self.readers.setdefault(id(value), []).append(node)

    def after(self, values: Iterable[ir.Value], *, through_shapes: bool = False) -> set[int]:
        """The nodes (by id) that depend on ``values``, by more than their shapes unless ``through_shapes``."""
        marked, found = {id(value) for value in values}, set()
        for node in self.nodes:
            if is_op(node, "Shape") and not through_shapes:
                continue
            if any(id(value) in marked for value in self.reads[id(node)]):
                found.add(id(node))
                marked.update(id(value) for value in node.outputs)
        return found

    def before(self, values: Iterable[ir.Value]) -> set[int]:
        """The nodes (by id) that ``values`` depend on, without those that compute constants."""
        marked, found = {id(value) for value in values}, set()
        for node in reversed(self.nodes):
            if self.reads[id(node)] and any(id(value) in marked for value in node.outputs):
                found.add(id(node))
                marked.update(id(value) for value in self.reads[id(node)])
        return found

    def ordered(self, nodes: set[int]) -> list[ir.Node]:
        return [node for node in self.nodes if id(node) in nodes]


def _all_reads(node: ir.Node) -> Iterator[ir.Value]:
    """The inputs of ``node``, and what its subgraphs read from outside."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type not in _WITH_SUBGRAPHS:
            continue
        single = attribute.type == ir.AttributeType.GRAPH
        for graph in [attribute.as_graph()] if single else attribute.as_graphs():
            for inner in ir.traversal.RecursiveGraphIterator(graph):
                yield from (value for value in inner.inputs if value is not None and value.graph is node.graph)


# --------------------------------------------------------------------------- where a block ends


@dataclasses.dataclass(frozen=True)
class _Ends:
    """A block, the value where it begins, and the values where it may end, in order."""

    block: Block
    start: ir.Value
    ends: list[ir.Value]


def _find_ends(view: _View, block: Block, linears: set[int]) -> _Ends | Uncut:
    own = {id(linear.node) for linear in block.linears}
    made = [value for linear in block.linears for value in linear.node.outputs]
    meetings = _meetings(view, own, view.after(made), linears - own)
    below = view.after(made, through_shapes=True)
    last = original_name(block.linears[-1].node)
    if not meetings:
        return Uncut(block.name, "what its linears make does not meet in one value again", last)
    starts = [(value, _residual(view, value, own, below)) for value in meetings]
    ends = [value for value, sources in starts if len(sources) == 1]
    if not ends:
        wide = next((sources for _, sources in starts if sources), [])
        names = ", ".join(str(value.name) for value in wide)
        reason = f"its residual has several sources: {names}" if wide else "no residual passes by its linears"
        return Uncut(block.name, reason, last)
    return _Ends(block, next(sources[0] for _, sources in starts if len(sources) == 1), ends)


def _meetings(view: _View, own: set[int], below: set[int], others: set[int]) -> list[ir.Value]:
    """The values that everything made by the linears ``own`` passes on its way to the first of ``others``.

    Without others below, on its way to the model's first output.
    """
    heads = [node for node in view.nodes if id(node) in others and id(node) in below]
    goals = [value for node in heads for value in view.reads[id(node)]] or view.outputs[:1]
    region = (own | below) & view.before(goals)
    wanted = {id(goal) for goal in goals}
    waiting, missing = _reader_counts(view, region), own & region
    live: dict[int, ir.Value] = {}
    found: list[ir.Value] = []
    for node in view.nodes:
        if id(node) in others and id(node) in below:
            break
        if id(node) not in region:
            continue
        missing = missing - {id(node)}
        for value in view.reads[id(node)]:
            waiting[id(value)] -= 1
            if not waiting[id(value)] and id(value) not in wanted:
                live.pop(id(value), None)
        live.update({id(v): v for v in node.outputs if waiting.get(id(v)) or id(v) in wanted})
        if not missing and len(live) == 1:
            found.extend(v for v in live.values() if not any(v is known for known in found))
    return found


def _reader_counts(view: _View, region: set[int]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for node in region:
        for value in view.reads[node]:
            counts[id(value)] = counts.get(id(value), 0) + 1
    return counts


def _residual(view: _View, end: ir.Value, own: set[int], below: set[int]) -> list[ir.Value]:
    """The values from before the block that reach ``end`` without passing a linear of the block."""
    pending, seen, sources = [end], {id(end)}, []
    while pending:
        value = pending.pop()
        producer = value.producer()
        if id(producer) in own:
            continue
        if id(producer) not in below:
            sources.append(value)
            continue
        for read in reversed(view.reads[id(producer)]):
            if id(read) not in seen and read.dtype in _FLOATS:
                seen.add(id(read))
                pending.append(read)
    return sources


# --------------------------------------------------------------------------- the parts


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Nodes (by id) that run as one; a block's ends."""

    name: str
    nodes: set[int]
    start: ir.Value | None = None
    end: ir.Value | None = None


def _bounded(view: _View, found: list[_Ends]) -> list[_Piece]:
    """The blocks with one end each, in the order in which they run: where another block begins, if one does."""
    starts = {id(one.start) for one in found}
    chosen: dict[int, ir.Value] = {}
    pieces = []
    for one in found:
        joined = next((value for value in reversed(one.ends) if id(value) in starts), None)
        end = joined if joined is not None else _last_end(one, chosen.get(id(one.start)))
        chosen[id(end)] = end
        pieces.append(_Piece(one.block.name, _inside(view, one, end), one.start, end))
    return sorted(pieces, key=lambda piece: view.place[id(piece.end.producer())])  # type: ignore[union-attr]


def _last_end(one: _Ends, before: ir.Value | None) -> ir.Value:
    """The end of a stack's last block: as the block before it ends, else by the names of the modules."""
    if before is not None:
        alike = [value for value in one.ends if _operator(value) == _operator(before)]
        return alike[0] if alike else one.ends[0]
    name = one.block.name
    named = [value for value in one.ends if f"{_layer(value)}.".startswith(f"{name}.")]
    return named[-1] if named else one.ends[0]


def _operator(value: ir.Value) -> str:
    producer = value.producer()
    return producer.op_type if producer is not None else ""


def _layer(value: ir.Value) -> str:
    producer = value.producer()
    return layer_name(producer) if producer is not None else ""


def _inside(view: _View, one: _Ends, end: ir.Value) -> set[int]:
    """The nodes of the block: from its start or its own linears to its end.

    What only needs the shape of the start, and sums and products (of masks), are inside when nothing else reads them.
    """
    own = {id(linear.node) for linear in one.block.linears}
    above = view.before([end])
    marked, inside = {id(one.start)}, set()
    for node in view.ordered(above):
        by_shape = is_op(node, "Shape") and any(value is one.start for value in view.reads[id(node)])
        if id(node) in own or (not by_shape and any(id(v) in marked for v in view.reads[id(node)])):
            inside.add(id(node))
            marked.update(id(value) for value in node.outputs)
    shapes = view.after([one.start], through_shapes=True)
    for node in reversed(view.ordered(above - inside)):
        apart = id(node) in shapes or (is_op(node, "Add", "Mul") and node.outputs[0] is not one.start)
        if apart and not any(_leaves(view, value, inside) for value in node.outputs):
            inside.add(id(node))
    return inside


def _pieces(view: _View, blocks: list[_Piece]) -> tuple[list[_Piece], list[Uncut]]:
    """All pieces in the order in which they run; a block that cannot be in a row with the others is left out."""
    done: set[int] = set()
    pieces: list[_Piece] = []
    uncut: list[Uncut] = []
    for number, block in enumerate(blocks):
        later = set().union(*(other.nodes for other in blocks[number + 1 :]))
        between = view.before(_outside(view, block.nodes)) - done
        shared = (block.nodes & done) | ((between | block.nodes) & later)
        if shared:
            node = view.ordered(shared)[0]
            reason = "it needs what a later block makes, or shares nodes with another one"
            uncut.append(Uncut(block.name, reason, original_name(node)))
            continue
        pieces += [_Piece(f"before {block.name}", between)] if between else []
        pieces.append(block)
        done |= between | block.nodes
    rest = view.before(view.outputs) - done
    return pieces + ([_Piece("the rest", rest)] if rest else []), uncut


def _outside(view: _View, nodes: set[int]) -> list[ir.Value]:
    """What ``nodes`` read and do not make, in the order of first reading."""
    found: dict[int, ir.Value] = {}
    for node in view.ordered(nodes):
        for value in view.reads[id(node)]:
            if id(value.producer()) not in nodes:
                found[id(value)] = value
    return list(found.values())


def _named(view: _View, pieces: list[_Piece]) -> Iterator[Part]:
    for piece in pieces:
        gives = [v for node in view.ordered(piece.nodes) for v in node.outputs if _leaves(view, v, piece.nodes)]
        needs = _outside(view, piece.nodes)
        yield Part(piece.name, _first(needs, piece.start), _first(gives, piece.end), is_block=piece.end is not None)


def _leaves(view: _View, value: ir.Value, nodes: set[int]) -> bool:
    return value.is_graph_output() or any(id(reader) not in nodes for reader in view.readers.get(id(value), []))


def _first(values: list[ir.Value], first: ir.Value | None) -> tuple[str, ...]:
    rest = [str(value.name) for value in values if value is not first]
    return tuple(rest if first is None else [str(first.name), *rest])
