"""Transformer blocks: by the layer index in the user's names, else by the attentions."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.functions import is_op
from qcompile.graph.linears import Linear, find_linears

ATTENTIONS = ("Attention", "GroupedAttention")


def is_spelled_attention(node: ir.Node) -> bool:
    """Whether ``node`` multiplies a softmax over the last axis with values: an attention that stayed spelled out."""
    if not is_op(node, "MatMul"):
        return False
    softmax = match.producer(node.inputs[0], "Softmax")
    shape = softmax.outputs[0].shape if softmax is not None else None
    last = {-1} if shape is None else {-1, len(shape) - 1}
    return softmax is not None and match.int_attribute(softmax, "axis", -1) in last


@dataclasses.dataclass(frozen=True)
class Block:
    """The linears of one transformer block, in graph order."""

    name: str
    linears: tuple[Linear, ...]


def find_blocks(model: ir.Model) -> list[Block]:
    """Linears grouped by their names up to the first number (``encoder.layer.3``).

    Names without numbers: a block starts at the first linear that leads to a new attention, is called
    ``block.0`` and so on, and the last one ends before the head.
    """
    linears = find_linears(model.graph)
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        prefix = _indexed_prefix(linear.name)
        if prefix:
            groups.setdefault(prefix, []).append(linear)
    if not groups:
        groups = _by_attention(model.graph, linears)
    return [Block(name, tuple(found)) for name, found in groups.items()]


def _indexed_prefix(name: str) -> str:
    """``h.3.attn.c_proj`` -> ``h.3``; "" when there is no number, or nothing before it."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: index + 1]) if index else ""


def _by_attention(graph: ir.Graph, linears: list[Linear]) -> dict[str, list[Linear]]:
    known = {id(linear.output): linear for linear in linears}
    starts: dict[int, int] = {}
    for count, node in enumerate(n for n in graph if is_op(n, *ATTENTIONS) or is_spelled_attention(n)):
        for value in node.inputs[:3]:
            source = _linear_above(value, known)
            if source is not None:
                starts.setdefault(id(source.node), count)
    groups: dict[str, list[Linear]] = {}
    current = None
    for linear in linears:
        current = starts.get(id(linear.node), current)
        if current is not None and not linear.is_head:
            groups.setdefault(f"block.{current}", []).append(linear)
    return groups


def _linear_above(value: ir.Value | None, known: dict[int, Linear]) -> Linear | None:
    """The nearest linear above, along first inputs."""
    while value is not None:
        if id(value) in known:
            return known[id(value)]
        node = match.producer(value)
        value = node.inputs[0] if node is not None and node.inputs else None
    return None
