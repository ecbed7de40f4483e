"""The key/value cache of a decoder: what a step joins to the keys and values of the steps before.

    present (B, heads, P + S, width)  =  Concat(past (B, heads, P, width), new (B, heads, S, width))  along tokens
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from qcompile.graph.blocks import ATTENTIONS
from qcompile.graph.canonical import match
from qcompile.graph.functions import is_op

TOKENS = 2  # the axis of tokens
SCALE, ZERO_POINT = "_scale", "_zero_point"  # behind a cache's name, where its codes have them


@dataclasses.dataclass(frozen=True)
class Cache:
    """One side of one layer's cache; ``node`` joins it."""

    past: ir.Value
    new: ir.Value
    node: ir.Node

    @property
    def present(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def name(self) -> str:
        """The name of the input that brings the past."""
        return str(self.past.name)

    @property
    def width(self) -> int | None:
        """Numbers of one token in one head, where that is known."""
        width = self.new.shape[-1] if self.new.shape is not None else None
        return width if isinstance(width, int) else None


def joined(value: ir.Value | None) -> Cache | None:
    """The cache that ``value`` is the present of: a Concat of two values of rank 4 along the tokens."""
    node = match.producer(value, "Concat")
    if node is None or len(node.inputs) != 2 or match.int_attribute(node, "axis", 0) not in (TOKENS, TOKENS - 4):
        return None
    past, new = node.inputs
    if past is None or new is None or any(x.shape is None or len(x.shape) != 4 for x in (past, new)):
        return None
    return Cache(past, new, node)


def is_of_keys(cache: Cache) -> bool:
    """Whether attentions read the present as their keys, and nothing else reads its numbers."""
    readers = [node for node in match.consumers(cache.present) if node.op_type != "Shape"]
    return bool(readers) and all(
        is_op(node, *ATTENTIONS) and [v is cache.present for v in node.inputs[:3]] == [False, True, False]
        for node in readers
    )


def find_caches(graph: ir.Graph) -> Iterator[Cache]:
    """Every cache whose past is an input of ``graph`` and whose present is an output of it, in graph order.

    Nothing else reads the numbers of the past; its sizes may be read.
    """
    for node in graph:
        cache = joined(node.outputs[0]) if node.op_type == "Concat" else None
        if cache is None or not cache.past.is_graph_input() or not cache.present.is_graph_output():
            continue
        if all(user is node or user.op_type == "Shape" for user in match.consumers(cache.past)):
            yield cache
