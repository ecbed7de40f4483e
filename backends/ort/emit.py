"""Putting nodes into a graph: the few shapes that every lowering needs."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompile.graph.provenance import inherit

MS = "com.microsoft"


def node_before(
    reader: ir.Node,
    domain: str,
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: Sequence[ir.Attr] = (),
) -> ir.Node:
    """A node with one output called ``name``, right before ``reader``, whose provenance it takes."""
    node = _made(domain, op, inputs, name, attributes, reader)
    assert reader.graph is not None
    reader.graph.insert_before(reader, node)
    return node


def node_after(
    source: ir.Node,
    domain: str,
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: Sequence[ir.Attr] = (),
) -> ir.Node:
    """A node with one output called ``name``, right after ``source``, whose provenance it takes."""
    node = _made(domain, op, inputs, name, attributes, source)
    assert source.graph is not None
    source.graph.insert_after(source, node)
    return node


def _made(
    domain: str,
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: Sequence[ir.Attr],
    like: ir.Node,
) -> ir.Node:
    node = inherit(ir.Node(domain, op, inputs, attributes, num_outputs=1), like)
    node.outputs[0].name = name
    return node
