"""Attention on token tensors: the standard operator of opset 23, with no transpose around it.

    Transpose(Reshape(q)), ... -> qcompile.Attention{scale} -> Reshape(Transpose)
        ->  Attention(q, k, v, bias){q_num_heads, kv_num_heads}          all of rank 3, (B, S, heads * d)
Grouped keys and values are not repeated. Heads that come some other way are transposed to this layout.

    k = Concat(past_k, new_k), v = Concat(past_v, new_v), both (B, H, P + S, d)
        ->  y, k, v = Attention(q, new_k, new_v, bias, past_k, past_v)          new ones (B, S, heads * d)
The operator joins past and present itself; no key or value of the past is moved twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from qcompile.backends.ort.causal import Chunks, is_causal
from qcompile.backends.ort.emit import put_node
from qcompile.backends.ort.rotary import Rotary
from qcompile.graph.caches import Cache, joined
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.functions import DOMAIN
from qcompile.graph.provenance import inherit, layer_name
from qcompile.graph.workspace import Workspace
from qcompile.ledger import Ledger

ATTENTIONS = ("Attention", "GroupedAttention")
_HEADS = [0, 2, 1, 3]


def rewrite(
    model: ir.Model, workspace: Workspace, ledger: Ledger, heads: Collection[ir.Value] = (), *, chunks: bool = True
) -> int:
    """Replace every attention of the project's domain; returns how many.

    ``heads``: keys and values that stay of rank 4, since they are made so, with all tokens of the past; ``chunks``:
    causal ones are cut, which saves a CPU half of the work
    """
    count = 0
    lowering = _Lowering(model, workspace, heads, chunks)
    for node in match.nodes(model.graph, *ATTENTIONS):
        if node.domain != DOMAIN:
            continue
        reason = lowering.replace(node)
        if reason:
            ledger.skip(layer_name(node), reason, str(node.name))
        count += not reason
    return count


class _Lowering:
    """Keeps what several attentions share: rotary tables and the expanded bias."""

    def __init__(self, model: ir.Model, workspace: Workspace, heads: Collection[ir.Value], cuts: bool) -> None:
        self.model, self.workspace, self.cuts = model, workspace, cuts
        self.by_heads = {id(value) for value in heads}
        self.rotary, self.chunks = Rotary(model, workspace), Chunks(model, workspace)
        self.biases: dict[int, ir.Value] = {}

    def replace(self, node: ir.Node) -> str:
        q, k, v, bias = node.inputs
        heads = [_heads(value) for value in (q, k, v)]
        if any(h is None for h in heads) or q is None or k is None or v is None:
            return "the number of heads or their width is not known"
        (q_heads, width), (kv_heads, _), (_, v_width) = heads  # type: ignore[misc]
        if id(k) in self.by_heads and id(v) in self.by_heads:
            return self._over_heads(node, [q, k, v], bias)
        caches = [cache for value in (k, v) if (cache := joined(value)) is not None]
        new_k, new_v = (cache.new for cache in caches) if len(caches) == 2 else (k, v)
        flat = [self._tokens(value, node) for value in (q, new_k, new_v)]
        inputs = [*flat, *self._bias(bias, node)]
        attributes = [ir.AttrInt64("q_num_heads", q_heads), ir.AttrInt64("kv_num_heads", kv_heads)]
        scale = node.attributes["scale"].as_float()
        if not math.isclose(scale, width**-0.5, rel_tol=1e-6):
            attributes.append(ir.AttrFloat32("scale", scale))
        name = f"{node.outputs[0].name}.context"
        if len(caches) == 2:
            new = self._with_past(inputs, caches, attributes, node, name)
        elif self.cuts and bias is not None and len(inputs) == 4 and is_causal(bias):
            new = self.chunks.attention(inputs, attributes, node, name)
        else:
            new = put_node(node, "", "Attention", inputs, name, attributes)
        _set(new.outputs[0], [*_leading(flat[0]), q_heads * v_width])
        self._put(node, new.outputs[0], q_heads, v_width)
        match.remove_dead(self.model.graph, [n for n in (x.producer() for x in (q, k, v)) if n is not None])
        return ""

    def _over_heads(self, node: ir.Node, operands: list[ir.Value], bias: ir.Value | None) -> str:
        """Attention(q, k, v, bias) of rank 4; only q, of the new tokens alone, is moved."""
        q, k, v = operands
        assert q.shape is not None
        tokens = self._tokens(q, node)
        shape = self._constant("heads", [0, 0, int(q.shape[1]), int(q.shape[3])])  # type: ignore[arg-type]
        split = put_node(node, "", "Reshape", [tokens, shape], f"{node.outputs[0].name}.q_split").outputs[0]
        perm = [ir.AttrInt64s("perm", _HEADS)]
        turned = put_node(node, "", "Transpose", [split], f"{node.outputs[0].name}.q", perm).outputs[0]
        scale = {"scale": node.attributes["scale"]}
        inputs = [turned, k, v, *self._bias(bias, node)]
        match.put_instead(node, match.new_node("", "Attention", inputs, scale, [node]))
        match.remove_dead(self.model.graph, [n for n in (q.producer(),) if n is not None])
        return ""

    def _with_past(
        self,
        inputs: list[ir.Value],
        caches: list[Cache],
        attributes: list[ir.Attr],
        reader: ir.Node,
        name: str,
    ) -> ir.Node:
        """Attention over past and new tokens that also gives the joined keys and values."""
        q, k, v, *bias = inputs
        joined_by = [q, k, v, bias[0] if bias else None, *(cache.past for cache in caches)]
        new = inherit(ir.Node("", "Attention", joined_by, attributes, num_outputs=3), reader)
        assert reader.graph is not None
        reader.graph.insert_before(reader, new)
        new.outputs[0].name = name
        for cache, present in zip(caches, new.outputs[1:], strict=True):
            old = cache.present
            present.type, present.shape, present.name, old.name = old.type, old.shape, old.name, f"{old.name}.joined"
            old.replace_all_uses_with(present, replace_graph_outputs=True)
        return new

    def _put(self, node: ir.Node, context: ir.Value, heads: int, width: int) -> None:
        """Give the readers of the (B, H, S, d) result the (B, S, H * d) one."""
        old = node.outputs[0]
        transpose = match.only_consumer(old, "Transpose")
        reshape = match.only_consumer(transpose.outputs[0], "Reshape") if transpose is not None else None
        if transpose is not None and reshape is not None and _permutation(transpose) == _HEADS:
            shape = reshape.outputs[0].shape
            if shape is not None and len(shape) == 3 and shape[2] == heads * width:
                reshape.outputs[0].replace_all_uses_with(context, replace_graph_outputs=True)
                match.remove_dead(self.model.graph, [reshape])
                return
        target = self._constant("heads", [0, 0, heads, width])
        split = put_node(node, "", "Reshape", [context, target], f"{old.name}.split")
        _set(split.outputs[0], [*_leading(context), heads, width])
        new = match.new_node("", "Transpose", [split.outputs[0]], {"p": ir.AttrInt64s("perm", _HEADS)}, [node])
        match.put_instead(node, new)

    def _tokens(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """``value`` (B, H, S, d) as (B, S, H * d)."""
        rope = match.producer(value, "RotaryEmbedding")
        if rope is not None and rope.domain == DOMAIN and rope.inputs[0] is not None and self.rotary.fits(rope):
            return self.rotary.replace(rope, self._tokens(rope.inputs[0], rope))
        transpose = match.producer(value, "Transpose")
        if transpose is None or _permutation(transpose) != _HEADS or transpose.inputs[0] is None:
            perm = [ir.AttrInt64s("perm", _HEADS)]
            transpose = put_node(reader, "", "Transpose", [value], f"{value.name}.by_token", perm)
            assert value.shape is not None
            _set(transpose.outputs[0], [value.shape[i] for i in _HEADS])
            return self._joined(transpose.outputs[0], reader)
        split = transpose.inputs[0]
        reshape = match.producer(split, "Reshape")
        source = reshape.inputs[0] if reshape is not None else None
        return source if source is not None and _same_tokens(source, split) else self._joined(split, reader)

    def _joined(self, split: ir.Value, reader: ir.Node) -> ir.Value:
        """(B, S, H, d) -> (B, S, H * d)."""
        assert split.shape is not None
        heads, width = split.shape[2], split.shape[3]
        assert isinstance(heads, int) and isinstance(width, int)
        target = self._constant("joined", [0, 0, heads * width])
        source = split.producer()
        put = put_node(reader, "", "Reshape", [split, target], f"{split.name}.joined")
        assert source is not None
        _set(put.outputs[0], [*list(split.shape)[:2], heads * width])
        return put.outputs[0]

    def _bias(self, bias: ir.Value | None, reader: ir.Node) -> list[ir.Value]:
        """The mask input, if any: every row written out, since the kernel broadcasts only batch and heads."""
        held = constant_array(bias)
        if bias is None or (held is not None and held.size == 1 and not held.any()):
            return []
        if _is_whole(bias):
            return [bias]
        if id(bias) not in self.biases:
            self.biases[id(bias)] = self._expanded(bias, reader)
        return [self.biases[id(bias)]]

    def _expanded(self, bias: ir.Value, reader: ir.Node) -> ir.Value:
        """``bias`` broadcast to (1, 1, S, T) at least."""
        q, k = reader.inputs[0], reader.inputs[1]
        span = [ir.AttrInt64("start", 2), ir.AttrInt64("end", 3)]
        sizes = [put_node(reader, "", "Shape", [x], f"{bias.name}.rows", span).outputs[0] for x in (q, k)]
        ones = self._constant("ones", [1, 1])
        axis = [ir.AttrInt64("axis", 0)]
        shape = put_node(reader, "", "Concat", [ones, *sizes], f"{bias.name}.shape", axis).outputs[0]
        whole = put_node(reader, "", "Expand", [bias, shape], f"{bias.name}.whole").outputs[0]
        whole.dtype = ir.DataType.FLOAT
        return whole

    def _constant(self, name: str, numbers: list[int]) -> ir.Value:
        return new_initializer(self.model, name, np.array(numbers, np.int64), self.workspace)


def _heads(value: ir.Value | None) -> tuple[int, int] | None:
    """(H, d) of a value (B, H, S, d)."""
    shape = value.shape if value is not None else None
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        return None
    return shape[1], shape[3]


def _is_whole(bias: ir.Value) -> bool:
    """Whether the last two dimensions are (S, T) as they stand."""
    shape = bias.shape
    return (
        shape is not None
        and len(shape) in (2, 4)
        and all(d != 1 for d in list(shape)[-2:])
        and None not in _names(shape)
    )


def _names(shape: ir.Shape) -> list[object]:
    return [d.value if isinstance(d, ir.SymbolicDim) else d for d in list(shape)[-2:]]


def _same_tokens(source: ir.Value, split: ir.Value) -> bool:
    """Whether Reshape only split the last axis: (B, S, H * d) -> (B, S, H, d)."""
    if source.shape is None or split.shape is None or len(source.shape) != 3 or len(split.shape) != 4:
        return False
    heads, width = split.shape[2], split.shape[3]
    return (
        isinstance(heads, int)
        and isinstance(width, int)
        and source.shape[2] == heads * width
        and list(source.shape)[:2] == list(split.shape)[:2]
    )


def _permutation(transpose: ir.Node) -> list[int]:
    return list(transpose.attributes["perm"].as_ints()) if "perm" in transpose.attributes else []


def _leading(value: ir.Value) -> list[object]:
    return [*value.shape][:2] if value.shape is not None else [None, None]


def _set(value: ir.Value, dims: list[object]) -> None:
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(dims)  # type: ignore[arg-type]
