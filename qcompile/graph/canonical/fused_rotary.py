"""Rotary embeddings of ONNX Runtime and ONNX 23 become qcompile.RotaryEmbedding over (B, H, S, d)."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.canonical.draft import Draft, float_attribute, given, width_of
from qcompile.graph.canonical.heads import as_heads, merge_heads

Decompose = Callable[[Draft, ir.Node], str]


def rotated(
    draft: Draft, x: ir.Value, cos: ir.Value, sin: ir.Value, table_width: int | None, interleaved: bool
) -> ir.Value | None:
    """Rotate the first r channels of (B, H, S, d) by tables (B or 1, S, r / 2); None: unknown width."""
    width = x.shape[-1] if x.shape is not None else None
    if not isinstance(width, int) or table_width is None:
        return None
    turned, rest = x, None
    if 2 * table_width < width:
        turned, rest = draft.ops(
            "Split", [x, draft.ints(2 * table_width, width - 2 * table_width)], 2, axis=-1
        )
    cos4, sin4 = (draft.op("Unsqueeze", draft.op("Concat", t, t, axis=-1), draft.ints(1)) for t in (cos, sin))
    if interleaved:
        turned = _regrouped(draft, turned, [0, 0, 0, -1, 2])
    turned = draft.own("RotaryEmbedding", turned, cos4, sin4)
    if interleaved:
        turned = _regrouped(draft, turned, [0, 0, 0, 2, -1])
    result = turned if rest is None else draft.op("Concat", turned, rest, axis=-1)
    result.shape, result.dtype = x.shape, ir.DataType.FLOAT
    return result


def _regrouped(draft: Draft, x: ir.Value, axes: list[int]) -> ir.Value:
    """Even channels before odd ones, or back: the last axis as a matrix, transposed."""
    matrix = draft.op("Transpose", draft.op("Reshape", x, draft.ints(*axes)), perm=[0, 1, 2, 4, 3])
    return draft.op("Reshape", matrix, draft.ints(0, 0, 0, -1))


def _microsoft_rotary(draft: Draft, node: ir.Node) -> str:
    """RotaryEmbedding(x, position_ids, cos (M, r / 2), sin): ids (B, S), or (1) for the first position."""
    x, places, cos, sin = node.inputs[:4]
    if match.int_attribute(node, "is_packed_batching", 0) or float_attribute(node, "scale", 1.0) != 1.0:
        return "it is packed or scaled"
    if x is None or places is None or places.shape is None or (x.shape is None and not _heads_of(node)):
        return "the rank of its inputs is not known"
    heads = as_heads(draft, x, _heads_of(node))
    if heads is None:
        return "the number of heads is not known"
    if len(places.shape) == 1:
        places = draft.op(
            "Unsqueeze", draft.op("Add", draft.range(draft.length(heads, 2)), places), draft.ints(0)
        )
    cos_rows, sin_rows = draft.op("Gather", cos, places), draft.op("Gather", sin, places)
    return _finish_rotary(draft, node, heads, (cos_rows, sin_rows), width_of(cos))


def _standard_rotary(draft: Draft, node: ir.Node) -> str:
    """RotaryEmbedding(x, cos, sin, position_ids) of ONNX 23; without ids the tables are (B, S, r / 2)."""
    x, cos, sin = node.inputs[:3]
    heads = as_heads(draft, x, _heads_of(node)) if x is not None else None
    if heads is None or cos is None or sin is None:
        return "the number of heads is not known"
    width, places = width_of(cos), given(node, 3)
    if places is not None:
        cos, sin = draft.op("Gather", cos, places), draft.op("Gather", sin, places)
    return _finish_rotary(draft, node, heads, (cos, sin), width)


def _finish_rotary(
    draft: Draft, node: ir.Node, heads: ir.Value, tables: tuple[ir.Value, ir.Value], width: int | None
) -> str:
    interleaved = bool(match.int_attribute(node, "interleaved", 0))
    result = rotated(draft, heads, *tables, width, interleaved)
    if result is None:
        return "the width of a head is not known"
    return draft.finish(result if heads is node.inputs[0] else merge_heads(draft, result))


def _heads_of(node: ir.Node) -> int:
    return match.int_attribute(node, "num_heads", 0)


MICROSOFT: dict[str, Decompose] = {"RotaryEmbedding": _microsoft_rotary}
STANDARD: dict[str, Decompose] = {"RotaryEmbedding": _standard_rotary}
