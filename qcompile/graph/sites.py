"""Sites: the places where an equivalent transform may move shift and scale, found on the dataflow.

    norm     LayerNorm / RMSNorm  ->  all readers of its output
    v_o      v projection  ->  attention  ->  output projection (values pass attention linearly)
    up_down  up projection (times gate, or through ReLU)  ->  down projection
    q_k      q projection  <->  k projection

A site names every consumer, and says why it cannot be used when one of them cannot be compensated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, is_tied
from qcompile.graph.functions import is_op
from qcompile.graph.provenance import layer_name, original_name

NORMS = ("LayerNormalization", "RMSNormalization")
ATTENTIONS = ("Attention", "GroupedAttention")
# Operators that keep the last axis as it is: a per-channel edit commutes with them.
_VIEWS = ("Identity", "Unsqueeze", "Squeeze", "Dropout")

Kind = Literal["norm", "v_o", "up_down", "q_k"]


@dataclasses.dataclass(frozen=True)
class Linear:
    """y = x W + b with x (..., K), W (K, N) constant and b (N) or absent.

    ``transposed``: W is ``Transpose`` of a table (N, K) that is an embedding as well (a tied head).
    """

    node: ir.Node
    name: str
    add: ir.Node | None
    transposed: bool = False

    @property
    def x(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> ir.Value:
        value = self.node.inputs[1]
        assert value is not None
        if self.transposed:
            value = value.producer().inputs[0]  # type: ignore[union-attr]
        assert value is not None
        return value

    @property
    def w(self) -> np.ndarray:
        """W as (K, N), mapped."""
        array = constant_array(self.weight)
        assert array is not None
        return array.T if self.transposed else array

    @property
    def bias(self) -> np.ndarray | None:
        return constant_array(self.add.inputs[1]) if self.add is not None else None

    @property
    def output(self) -> ir.Value:
        return (self.add or self.node).outputs[0]

    @property
    def is_head(self) -> bool:
        """Whether the result is the model's output: the language-model head or a classifier."""
        return self.transposed or _reaches_output(self.output)


def _reaches_output(value: ir.Value) -> bool:
    while not value.is_graph_output():
        node = match.only_consumer(value, "Cast", "Identity", "Tanh", "Mul", "Div", *_VIEWS)
        if node is None:
            return False
        value = node.outputs[0]
    return True


@dataclasses.dataclass(frozen=True)
class Other:
    """A reader that is no linear: gets an inserted ``x * s + z`` when the producer is changed."""

    node: ir.Node | None  # None: the value is an output of the graph
    value: ir.Value
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Site:
    """One place to transform. ``channels`` is the width of the tensor that is shifted and scaled.

    ``expand`` maps the producer's channels to the consumer's rows: ``consumer_row -> producer_channel``
    (identity except for grouped queries).
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

    @property
    def channels(self) -> int:
        return int(self.linears[0].w.shape[0])


# --------------------------------------------------------------------------- linears


def find_linears(graph: ir.Graph) -> list[Linear]:
    """Every MatMul with a constant matrix on its right, in graph order."""
    return [linear for node in graph if (linear := as_linear(node)) is not None]


def as_linear(node: ir.Node) -> Linear | None:
    if not is_op(node, "MatMul") or node.inputs[0] is None or constant_array(node.inputs[0]) is not None:
        return None
    array, transposed = constant_array(node.inputs[1]), False
    if array is None:
        transpose = match.producer(node.inputs[1], "Transpose")
        array = constant_array(transpose.inputs[0]) if transpose is not None else None
        transposed = True
    if array is None or array.ndim != 2:
        return None
    return Linear(node, layer_name(node), _bias_add(node, array.shape[0 if transposed else 1]), transposed)


def _bias_add(product: ir.Node, width: int) -> ir.Node | None:
    add = match.only_consumer(product.outputs[0], "Add")
    if add is None or add.inputs[0] is not product.outputs[0]:
        return None
    bias = constant_array(add.inputs[1])
    return add if bias is not None and bias.shape == (width,) else None


def find_embeddings(graph: ir.Graph) -> list[ir.Node]:
    """Gathers of whole rows from a constant table (V, C)."""
    found = []
    for node in graph:
        table = constant_array(node.inputs[0]) if is_op(node, "Gather") else None
        if table is not None and table.ndim == 2 and table.dtype == np.float32 and table.shape[0] > 1:
            if match.int_attribute(node, "axis", 0) == 0:
                found.append(node)
    return found


# --------------------------------------------------------------------------- sites


def find_sites(model: ir.Model) -> list[Site]:
    """All sites in graph order."""
    linears = {id(linear.node): linear for linear in find_linears(model.graph)}
    by_output = {id(linear.output): linear for linear in linears.values()}
    sites: list[Site] = []
    for node in model.graph:
        if is_op(node, *NORMS):
            sites.extend(_norm_site(node, linears))
        elif is_op(node, *ATTENTIONS):
            sites.extend(_attention_sites(node, linears, by_output))
        elif is_op(node, "Mul", "Relu"):
            sites.extend(_up_down_site(node, linears, by_output))
    return sites


def readers(value: ir.Value, linears: dict[int, Linear]) -> tuple[list[Linear], list[Other]]:
    """All readers of ``value``, seen through operators that keep its last axis."""
    found: list[Linear] = []
    others = [Other(None, value)] if value.is_graph_output() else []
    for use in value.uses():
        linear = linears.get(id(use.node))
        if linear is not None and use.idx == 0:
            found.append(linear)
        elif _keeps_last_axis(use.node, use.idx, value):
            below, beside = readers(use.node.outputs[0], linears)
            if below and not beside:
                found.extend(below)
            else:
                others.append(Other(use.node, value, use.idx))
        else:
            others.append(Other(use.node, value, use.idx))
    return found, others


def _keeps_last_axis(node: ir.Node, index: int, value: ir.Value) -> bool:
    if index != 0:
        return False
    if is_op(node, "Identity", "Dropout"):
        return True
    output = node.outputs[0]
    same = value.shape is not None and output.shape is not None and _last(value) == _last(output) is not None
    if is_op(node, "Reshape", "Slice", "GatherND", *_VIEWS):
        return same
    if is_op(node, "Gather"):
        rank = len(value.shape) if value.shape is not None else 0
        return same and 0 <= match.int_attribute(node, "axis", 0) < rank - 1
    return False


def _last(value: ir.Value) -> int | None:
    return value.shape[-1] if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int) else None


def _norm_site(node: ir.Node, linears: dict[int, Linear]) -> Iterator[Site]:
    tensor = node.outputs[0]
    found, others = readers(tensor, linears)
    body = [linear for linear in found if not linear.is_head]
    if not body:
        return
    reason = ""
    if any(constant_array(v) is None for v in node.inputs[1:]):
        reason = "gamma or beta is computed at run time"
    elif any(linear.transposed for linear in found):
        reason = "a reader is the tied head, whose table is the embedding"
    elif len({linear.w.shape[0] for linear in found}) != 1:
        reason = "readers have different widths"
    yield Site("norm", layer_name(node), tensor, node, tuple(found), tuple(others), reason=reason)


def _attention_sites(node: ir.Node, linears: dict[int, Linear], by_output: dict[int, Linear]) -> Iterator[Site]:
    q, k, v = (_head_source(value, by_output) for value in node.inputs[:3])
    output = _context_reader(node.outputs[0], linears)
    if v is not None and output is not None:
        yield _v_o_site(node, v, output)
    if q is not None and k is not None:
        yield Site("q_k", f"{k.name}", k.output, node, (q, k))


def _head_source(value: ir.Value | None, by_output: dict[int, Linear]) -> Linear | None:
    """The linear behind heads (B, H, S, d): through Transpose and Reshape, each with one reader."""
    while value is not None:
        linear = by_output.get(id(value))
        if linear is not None:
            return linear
        node = match.producer(value, "Transpose", "Reshape", "RotaryEmbedding", "RMSNormalization")
        if node is None or len(list(value.uses())) != 1:
            return None
        value = node.inputs[0]
    return None


def _context_reader(value: ir.Value, linears: dict[int, Linear]) -> Linear | None:
    """The only linear that reads the context (B, H, S, d), through Transpose [0, 2, 1, 3] and Reshape."""
    transposed = False
    while True:
        node = match.only_consumer(value)
        if node is None:
            return None
        if id(node) in linears and node.inputs[0] is value:
            return linears[id(node)] if transposed else None
        if is_op(node, "Transpose"):
            transposed = list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]
        elif not is_op(node, "Reshape"):
            return None
        value = node.outputs[0]


def _v_o_site(node: ir.Node, v: Linear, output: Linear) -> Site:
    groups = match.int_attribute(node, "groups", 1)
    values = node.inputs[2]
    width = _last(values) if values is not None else None
    kv, rows = int(v.w.shape[1]), int(output.w.shape[0])
    reason, expand = "", None
    if kv * groups != rows or width is None or kv % width:
        reason = f"value width {kv} and output projection width {rows} do not fit {groups} groups"
    else:
        heads = np.arange(kv // width).repeat(groups)
        expand = (heads[:, None] * width + np.arange(width)[None]).reshape(-1)
    if v.output.is_graph_output() or len(list(v.output.uses())) != 1:
        reason = "the value projection has another reader"
    return Site("v_o", output.name, output.x, node, (output,), source=v, expand=expand, reason=reason)


def _up_down_site(node: ir.Node, linears: dict[int, Linear], by_output: dict[int, Linear]) -> Iterator[Site]:
    reader = match.only_consumer(node.outputs[0])
    down = linears.get(id(reader)) if reader is not None else None
    if down is None:
        return
    sources = [by_output.get(id(v)) for v in node.inputs if v is not None]
    up = next((s for s in sources if s is not None), None)
    if up is None or (node.op_type == "Mul" and len(node.inputs) == 2 and constant_array(node.inputs[1]) is not None):
        return
    reason = "" if len(list(up.output.uses())) == 1 else "the up projection has another reader"
    yield Site("up_down", down.name, down.x, node, (down,), source=up, reason=reason)


# --------------------------------------------------------------------------- blocks


@dataclasses.dataclass(frozen=True)
class Block:
    """One transformer block: the span of graph positions of one layer, by the layer index in user names."""

    name: str
    linears: tuple[Linear, ...]


def find_blocks(model: ir.Model) -> list[Block]:
    """Linears grouped by the longest prefix ``....N`` of their names, in graph order."""
    groups: dict[str, list[Linear]] = {}
    for linear in find_linears(model.graph):
        parts = linear.name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if index is not None:
            groups.setdefault(".".join(parts[: index + 1]), []).append(linear)
    return [Block(name, tuple(found)) for name, found in groups.items()]


def describe(site: Site) -> str:
    """The site in the user's names, for reports."""
    return f"{site.kind}:{site.name or original_name(site.producer)}"


__all__ = ["Block", "Linear", "Other", "Site", "describe", "find_blocks", "find_embeddings", "find_linears", "find_sites", "is_tied"]
