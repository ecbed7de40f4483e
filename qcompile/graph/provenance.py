"""The names that the user's model gave to nodes and values; reports and patterns speak in these.

Names live in ``metadata_props``, so they survive saving. ``remember`` is called at capture, before anything
is rewritten; a rewrite that makes a node calls ``inherit``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

import onnx_ir as ir

ORIGIN = "qcompile.origin"
LAYER = "qcompile.layer"
# Written by torch's exporter: the modules from the root to the node, then the node's own fx name.
TORCH_SCOPES = "pkg.torch.onnx.name_scopes"

_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "GroupNormalization")
_WEIGHTED = ("MatMul", "Gemm", "Gather", "Conv", *_NORMS)
_PASS_THROUGH = ("Transpose", "Identity", "Cast", "Reshape", "DequantizeLinear")
_WEIGHT_SUFFIX = re.compile(r"\.(weight|bias|gamma|beta|kernel)$")
# What exporters call a tensor that lost its name: val_12, onnx::MatMul_1234, 57, /Constant_3_output_0.
_ANONYMOUS = re.compile(r"^(val|node|const|tmp|onnx)?(::\w+)?_?\d*$|^/?(.*/)?Constant(_\d+)?(_output_0)?$")


def original_name(item: ir.Node | ir.Value) -> str:
    """The name that a node or value had in the user's model; its present name when it is new."""
    return item.metadata_props.get(ORIGIN) or item.name or _unnamed(item)


def is_anonymous(value: ir.Value) -> bool:
    """Whether ``value`` had no name in the user's model, or one that an exporter made up."""
    return bool(_ANONYMOUS.match(value.metadata_props.get(ORIGIN, "")))


def layer_name(node: ir.Node) -> str:
    """The module that the node came from, such as ``model.layers.3.mlp.down_proj``.

    The best of: torch's module path, a node name that spells a path, the constant weight's name without
    ``.weight``, the node's own name. Several nodes may share one: a layer is not always one node.
    """
    return node.metadata_props.get(LAYER) or _computed_layer(node) or original_name(node)


def remember(model: ir.Model) -> None:
    """Write the present names into the metadata of every node, initializer and output that has none yet."""
    for graph in _graphs(model):
        for node in graph:
            _remember_node(node)
        if isinstance(graph, ir.Graph):
            for value in graph.initializers.values():
                _remember_value(value)


def inherit(new: ir.Node, old: ir.Node | Iterable[ir.Node]) -> ir.Node:
    """Give ``new`` the names of the nodes that it replaces, of the first with a weight if any; returns it."""
    olds = [old] if isinstance(old, ir.Node) else list(old)
    if not olds:
        return new
    source = next((node for node in olds if _weight(node) is not None), olds[0])
    new.metadata_props[ORIGIN] = original_name(source)
    new.metadata_props[LAYER] = layer_name(source)
    if TORCH_SCOPES in source.metadata_props:
        new.metadata_props[TORCH_SCOPES] = source.metadata_props[TORCH_SCOPES]
    return new


def _graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    yield from model.graphs()
    yield from model.functions.values()


def _remember_node(node: ir.Node) -> None:
    if ORIGIN not in node.metadata_props:
        node.metadata_props[ORIGIN] = node.name or _unnamed(node)
    if LAYER not in node.metadata_props:
        node.metadata_props[LAYER] = layer_name(node)
    for value in node.outputs:
        _remember_value(value)


def _remember_value(value: ir.Value) -> None:
    if value.name and ORIGIN not in value.metadata_props:
        value.metadata_props[ORIGIN] = value.name


def _unnamed(item: ir.Node | ir.Value) -> str:
    """A nameless node is known by its first output."""
    if isinstance(item, ir.Value):
        return "(unnamed)"
    output = item.outputs[0].name if item.outputs else None
    return f"{item.op_type}:{output}" if output else item.op_type


def _computed_layer(node: ir.Node) -> str:
    return _torch_scope(node) or _node_path(node.name or "") or _weight_path(node)


def _torch_scope(node: ir.Node) -> str:
    text = node.metadata_props.get(TORCH_SCOPES, "")
    if not text:
        return ""
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ""
    modules = [str(scope) for scope in scopes[:-1] if scope] if isinstance(scopes, list) else []
    return modules[-1] if modules else ""


def _node_path(name: str) -> str:
    """``/layers.3/mlp/down_proj/MatMul`` (torch's older exporter) -> ``layers.3.mlp.down_proj``."""
    if not name.startswith("/"):
        return ""
    return ".".join(part for part in name.split("/")[1:-1] if part)


def _weight_path(node: ir.Node) -> str:
    weight = _weight(node)
    name = original_name(weight) if weight is not None else ""
    return "" if _ANONYMOUS.match(name) else _WEIGHT_SUFFIX.sub("", name)


def _weight(node: ir.Node) -> ir.Value | None:
    """The constant parameter of a linear layer, embedding or norm, looked up through layout nodes."""
    if node.op_type not in _WEIGHTED:
        return None
    for value in node.inputs:
        root = _root(value)
        if root is not None and root.is_initializer():
            return root
    return None


def _root(value: ir.Value | None) -> ir.Value | None:
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or producer.op_type not in _PASS_THROUGH:
            break
        value = producer.inputs[0]
    return value
