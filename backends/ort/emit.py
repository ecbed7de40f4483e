"""Putting nodes into a graph: the few shapes that every lowering needs."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompile.graph.provenance import inherit

MS = "com.microsoft"


def put_node(
    anchor: ir.Node,
    domain: str,
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: Sequence[ir.Attr] = (),
    *,
    after: bool = False,
) -> ir.Node:
    """A node with one output called ``name``, right before or after ``anchor``, whose provenance it takes."""
    node = inherit(ir.Node(domain, op, inputs, attributes, num_outputs=1), anchor)
    node.outputs[0].name = name
    assert anchor.graph is not None
    (anchor.graph.insert_after if after else anchor.graph.insert_before)(anchor, node)
    return node
