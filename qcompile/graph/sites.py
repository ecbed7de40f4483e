"""Sites: the places where an equivalent transform may move shift and scale, found on the dataflow.

    norm     LayerNorm / RMSNorm  ->  all readers of its output
    v_o      v projection  ->  attention  ->  output projection (values pass attention linearly)
    up_down  up projection (times gate, or through ReLU)  ->  down projection
    q_k      k projection  ->  scores  <-  q projection

A site names every consumer, and says why it cannot be used when one of them cannot be compensated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import onnx_ir as ir

from qcompile.graph.blocks import ATTENTIONS, is_spelled_attention
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array
from qcompile.graph.functions import is_op
from qcompile.graph.linears import Linear, as_linear, find_embeddings, find_experts, find_linears
from qcompile.graph.provenance import layer_name, original_name
from qcompile.graph.readers import Other, keeps_last_axis, readers, table_readers
from qcompile.graph.trace import Leaf, Trace, follow

NORMS = ("LayerNormalization", "RMSNormalization")
_CURVES = ("Gelu", "Silu", "Tanh", "Sigmoid", "Elu", "HardSwish", "Mish", "Softplus")
_FAR = 32  # nodes between a projection and an attention at most
_BETWEEN = ("Relu", "Pow", "Mul", "Identity", "Dropout", *_CURVES)  # an activation that is spelled out
_MOVES = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Slice", "Gather", "Split", "RotaryEmbedding",
          "Identity", "Dropout")  # fmt: skip

Kind = Literal["norm", "v_o", "up_down", "q_k"]


@dataclasses.dataclass(frozen=True)
class Site:
    """One place to transform; its shift and scale have one entry for each of ``channels``.

    ``experts``: readers with a table of matrices (a mixture of experts), compensated like ``linears``.
    ``source``: the linear whose output carries the channels, channel i in column ``columns[i]`` (None: i).
    ``expand``: reader's row -> channel (None: the same); for q_k, ``partner[j]`` is the column of q that
    meets channel ``expand[j]``. ``ties``: the channels that must have one scale (rotary pairs) share a
    number. ``heads``: for v_o, source's columns (kv heads, d) and reader's rows (kv heads, times, d).
    """

    kind: Kind
    name: str
    tensor: ir.Value
    producer: ir.Node
    linears: tuple[Linear, ...]
    others: tuple[Other, ...] = ()
    source: Linear | None = None
    expand: np.ndarray | None = None
    reason: str = ""
    experts: tuple[Linear, ...] = ()
    columns: np.ndarray | None = None
    partner: np.ndarray | None = None
    ties: np.ndarray | None = None
    heads: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def channels(self) -> int:
        """How many entries shift and scale have."""
        if self.columns is not None:
            return int(self.columns.size)
        return self.source.columns if self.source is not None else (self.linears or self.experts)[0].rows


def find_sites(model: ir.Model) -> list[Site]:
    """All sites in graph order."""
    return _Finder(model.graph).sites()


def tied(site: Site, scale: np.ndarray) -> np.ndarray:
    """``scale`` with the geometric mean in place of the entries that must be equal."""
    if site.ties is None:
        return scale
    _, group = np.unique(site.ties, return_inverse=True)
    total = np.bincount(group, np.log(scale)) / np.bincount(group)
    return np.asarray(np.exp(total)[group], scale.dtype)


def describe(site: Site) -> str:
    """The site in the user's names, for reports."""
    return f"{site.kind}:{site.name or original_name(site.producer)}"


# --------------------------------------------------------------------------- finding


@dataclasses.dataclass(frozen=True)
class _Channels:
    """Which columns of a linear reach one input of an operator, in the axes of that input."""

    linear: Linear
    columns: np.ndarray  # (heads, d) at an attention, (width,) at an elementwise operator
    passed: frozenset[str]
    alone: bool  # nothing else reads these columns
    mixed: np.ndarray  # (pairs, 2) columns that a rotary embedding mixes


class _Finder:
    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._readers = {id(linear.node): linear for linear in [*find_linears(graph), *find_experts(graph)]}
        self._products = {id(linear.output): linear for linear in self._readers.values()}
        self._entries: dict[tuple[int, int], tuple[Linear, Trace, Leaf]] = {}
        for linear in self._readers.values():
            trace = follow(linear.output)
            for leaf in trace.leaves if trace is not None else ():
                if leaf.node is not None and trace is not None:
                    self._entries[id(leaf.node), leaf.index] = (linear, trace, leaf)

    def sites(self) -> list[Site]:
        found: list[Site] = []
        for node in self._graph:
            if is_op(node, *NORMS):
                found.extend(self._norm(node))
            elif is_op(node, *ATTENTIONS):
                found.extend(self._v_o(node, 2))
                found.extend(self._q_k(node))
            elif is_spelled_attention(node):
                found.extend(self._v_o(node, 1))
            elif is_op(node, "Mul", "Relu", "Pow", *_CURVES):
                found.extend(self._up_down(node))
        return found

    def _norm(self, node: ir.Node) -> Iterator[Site]:
        tensor = node.outputs[0]
        found, others = readers(tensor, self._readers)
        linears = tuple(linear for linear in found if not linear.chosen)
        experts = tuple(linear for linear in found if linear.chosen)
        if not found:
            return
        reason = ""
        if any(constant_array(v) is None for v in node.inputs[1:]):
            reason = "gamma or beta is computed at run time"
        elif any(linear.transposed and table_readers(linear) is None for linear in found):
            reason = "a reader is the tied head, and more than lookups and this head read its table"
        elif not linears:
            reason = "every reader is an expert chosen for each token"
        yield Site("norm", layer_name(node), tensor, node, linears or experts, tuple(others), reason=reason,
                   experts=experts if linears else ())  # fmt: skip

    def _v_o(self, node: ir.Node, values: int) -> Iterator[Site]:
        source = self._heads(node, values)
        found = self._context_reader(node)
        if source is None and found is not None:
            linear, between = self._above(node.inputs[values])
            if linear is not None:
                reason = f"{_obstacle(between)} between the value projection and the attention"
                yield Site("v_o", found[0].name, found[0].x, node, found[:1], source=linear, reason=reason)
        if source is None or found is None:
            return
        output, heads, within = found  # of each row of the output projection
        query_heads = int(heads.max()) + 1
        columns, expand = np.unique(
            source.columns[heads * source.columns.shape[0] // query_heads, within], return_inverse=True
        )
        reason = ""
        if source.passed:
            reason = f"{', '.join(sorted(source.passed))} between the value projection and the attention"
        elif not source.alone:
            reason = "the value projection has another reader"
        yield Site(
            "v_o", output.name, output.x, node, (output,), source=source.linear, expand=expand,
            columns=_unless_all(columns, source.linear), reason=reason,
            heads=_head_rows(source.columns, heads, within),
        )  # fmt: skip

    def _q_k(self, node: ir.Node) -> Iterator[Site]:
        q, k = self._heads(node, 0), self._heads(node, 1)
        if q is None or k is None:
            yield from self._parted_heads(node)
            return
        heads = np.arange(q.columns.shape[0]) * k.columns.shape[0] // q.columns.shape[0]
        columns, expand = np.unique(k.columns[heads], return_inverse=True)
        reason = "" if q.alone and k.alone else "the query or key projection has another reader"
        yield Site(
            "q_k", k.linear.name, k.linear.output, node, (q.linear,), source=k.linear,
            expand=expand.reshape(-1), columns=_unless_all(columns, k.linear),
            partner=q.columns.reshape(-1), ties=_ties(columns, k.mixed), reason=reason,
        )  # fmt: skip

    def _parted_heads(self, node: ir.Node) -> Iterator[Site]:
        """Queries and keys with something between projection and scores that is no layout."""
        (q, above_q), (k, above_k) = (self._above(value) for value in node.inputs[:2])
        if q is None or k is None:
            return
        if any(is_op(one, *NORMS) for one in above_q + above_k):
            reason = "queries and keys are normalised for each head, which undoes a scale of the projection"
        else:
            reason = f"{_obstacle(above_q + above_k)} between the query and key projections and the attention"
        yield Site("q_k", k.name, k.output, node, (q,), source=k, reason=reason)

    def _above(self, value: ir.Value | None) -> tuple[Linear | None, list[ir.Node]]:
        """The nearest linear above ``value``, along the first inputs that are computed, and the nodes between."""
        nodes: list[ir.Node] = []
        while value is not None and id(value) not in self._products:
            node = match.producer(value)
            value = None
            if node is not None and len(nodes) < _FAR:
                nodes.append(node)
                made = (v for v in node.inputs if v is not None and v.producer() is not None)
                value = next((v for v in made if constant_array(v) is None), None)
        return self._products.get(id(value)), nodes

    def _up_down(self, node: ir.Node) -> Iterator[Site]:
        down = self._row_reader(node.outputs[0])
        if down is None:
            return
        up = next((c for i in range(len(node.inputs)) if (c := self._vector(node, i)) is not None), None)
        if up is None:
            yield from self._other_curve(node, down)
        if up is None or up.columns.size != down.rows:
            return
        reason = "" if up.alone else "the up projection has another reader"
        if is_op(node, *_CURVES):
            reason = f"{node.op_type} does not commute with a scale"
        elif down.chosen:
            reason = "the down projections are experts chosen for each token"
        elif up.passed:
            reason = "a factor stands between the projections"
        in_order = np.array_equal(up.columns, np.arange(up.linear.columns))
        yield Site(
            "up_down", down.name, down.x, node, (down,), source=up.linear,
            columns=None if in_order else up.columns, reason=reason,
        )  # fmt: skip

    def _other_curve(self, node: ir.Node, down: Linear) -> Iterator[Site]:
        """An activation of several operators (the square of ReLU)."""
        up, between = self._above(node.outputs[0])
        spelled = len(between) > 1 and all(is_op(n, *_BETWEEN) for n in between)
        if up is not None and up.columns == down.rows and spelled:
            reason = f"{' after '.join(n.op_type for n in between)} does not commute with a scale"
            yield Site("up_down", down.name, down.x, node, (down,), source=up, reason=reason)

    # ----------------------------------------------------------------------- channels by traces

    def _heads(self, node: ir.Node, index: int) -> _Channels | None:
        """The columns behind heads (B, H, S, d) at an attention's input."""
        entry = self._entries.get((id(node), index))
        if entry is None or entry[2].codes.ndim != 4:
            return None
        linear, trace, leaf = entry
        rows, columns = _rows_and_columns(trace, leaf)
        batch, _, length, _ = columns.shape
        if batch * length != int(np.prod(trace.shape[:-1])):
            return None
        expected = np.arange(batch * length).reshape(batch, 1, length, 1)
        if not (rows == expected).all() or not (columns == columns[:1, :, :1]).all():
            return None
        return self._channels(linear, trace, leaf, columns[0, :, 0])

    def _vector(self, node: ir.Node, index: int) -> _Channels | None:
        """The columns behind the last axis of an elementwise operator's input."""
        entry = self._entries.get((id(node), index))
        if entry is None:
            return None
        linear, trace, leaf = entry
        rows, columns = _rows_and_columns(trace, leaf)
        flat = columns.reshape(-1, columns.shape[-1])
        aligned = (rows.reshape(flat.shape) == np.arange(len(flat))[:, None]).all()
        if not aligned or not (flat == flat[:1]).all() or len(set(flat[0].tolist())) != flat.shape[1]:
            return None
        return self._channels(linear, trace, leaf, flat[0])

    def _channels(self, linear: Linear, trace: Trace, leaf: Leaf, columns: np.ndarray) -> _Channels:
        width = trace.shape[-1]
        alone = not any(
            np.isin(other.codes % width, columns).any() for other in trace.leaves if other is not leaf
        )
        return _Channels(linear, columns, leaf.passed, alone, np.unique(trace.mixed % width, axis=0))

    def _context_reader(self, node: ir.Node) -> tuple[Linear, np.ndarray, np.ndarray] | None:
        """The only linear that reads the context (B, H, S, d); for each of its rows the head and place."""
        trace = follow(node.outputs[0])
        if trace is None or len(trace.leaves) != 1 or trace.leaves[0].passed or len(trace.shape) != 4:
            return None
        leaf = trace.leaves[0]
        linear = self._readers.get(id(leaf.node))
        if linear is None or leaf.index != 0:
            return None
        batch, heads, length, within = np.unravel_index(
            leaf.codes.reshape(-1, leaf.codes.shape[-1]), trace.shape
        )
        rows = batch * trace.shape[2] + length
        straight = (rows == np.arange(len(rows))[:, None]).all()
        if not straight or not (heads == heads[:1]).all() or not (within == within[:1]).all():
            return None
        return linear, heads[0], within[0]

    def _row_reader(self, value: ir.Value) -> Linear | None:
        """The only reader of ``value``, when it is a linear that keeps its last axis."""
        while (node := match.only_consumer(value)) is not None:
            linear = self._readers.get(id(node))
            if linear is not None:
                return linear if node.inputs[0] is value else None
            if not keeps_last_axis(node, 0, value) or node.inputs[0] is not value:
                return None
            value = node.outputs[0]
        return None


def _obstacle(between: list[ir.Node]) -> str:
    """What keeps heads from being followed through the nodes ``between`` them and their projection."""
    for node in between:
        if is_op(node, "Concat") and any(value is not None and value.is_graph_input() for value in node.inputs):
            return "the key/value cache stands"
    found = [node.op_type for node in between if not is_op(node, *_MOVES)]
    plain = [op for op in found if op != "Concat"]
    return f"{(plain or found)[0]} stands" if found else "an order of heads that is not read in whole stands"


def _rows_and_columns(trace: Trace, leaf: Leaf) -> tuple[np.ndarray, np.ndarray]:
    return leaf.codes // trace.shape[-1], leaf.codes % trace.shape[-1]


def _unless_all(columns: np.ndarray, linear: Linear) -> np.ndarray | None:
    return None if columns.size == linear.columns else columns


def _head_rows(columns: np.ndarray, heads: np.ndarray, within: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The columns of each value head once, (kv heads, d), and the rows that read it, (kv heads, times, d).

    ``columns`` are those of the attention's heads, equal where one is repeated. None when rows do not read each head
    in whole, as often as the others.
    """
    rows = np.full((int(heads.max()) + 1, columns.shape[1]), -1)
    rows[heads, within] = np.arange(heads.size)
    distinct, number = np.unique(columns, axis=0, return_inverse=True)
    number = number.reshape(-1)[np.arange(len(rows)) * len(columns) // len(rows)]
    counts = np.bincount(number, minlength=len(distinct))
    if heads.size != rows.size or (rows < 0).any() or len(set(counts.tolist())) > 1:
        return None
    if np.unique(distinct).size != distinct.size:
        return None
    return distinct, rows[np.argsort(number, kind="stable")].reshape(len(distinct), -1, columns.shape[1])


def _ties(columns: np.ndarray, mixed: np.ndarray) -> np.ndarray | None:
    """For each channel the smallest channel that it is mixed with; None when none is."""
    if not len(mixed):
        return None
    place = {int(c): i for i, c in enumerate(columns)}
    ties = np.arange(columns.size)
    for left, right in mixed.tolist():
        if left in place and right in place:
            ties[place[right]] = ties[place[left]] = min(ties[place[left]], ties[place[right]])
    return ties


__all__ = [
    "ATTENTIONS", "Linear", "Other", "Site", "as_linear", "describe", "find_embeddings", "find_experts",
    "find_linears", "find_sites", "tied",
]  # fmt: skip
