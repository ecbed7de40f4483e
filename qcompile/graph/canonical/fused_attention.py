"""Fused attention operators of ONNX Runtime and of ONNX 23 and 24, taken apart.

Each becomes qcompile.Attention or GroupedAttention over heads (B, H, S, d) with one additive bias. A key that
a query may not see gets the operator's filter value, or ``MASKED``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.canonical.attention import MASKED, make_finite
from qcompile.graph.canonical.draft import Draft, float_attribute, given, is_used, width_of
from qcompile.graph.canonical.fused_rotary import rotated
from qcompile.graph.canonical.heads import as_heads, merge_heads, split_heads
from qcompile.graph.edits import constant_array

Decompose = Callable[[Draft, ir.Node], str]


# --------------------------------------------------------------------------- heads


def _attention(
    draft: Draft,
    heads: tuple[ir.Value, ir.Value, ir.Value],
    bias: ir.Value | None,
    scale: float | None,
    groups: int,
) -> ir.Value | None:
    """The context (B, H, S, d); None when the scale is by default and the head's width is not known."""
    q, _, v = heads
    width = q.shape[-1] if q.shape is not None else None
    if scale is None:
        if not isinstance(width, int):
            return None
        scale = 1 / math.sqrt(width)
    inputs = (*heads, bias if bias is not None else draft.number(0.0))
    if groups == 1:
        result = draft.own("Attention", *inputs, scale=scale)
    else:
        result = draft.own("GroupedAttention", *inputs, scale=scale, groups=groups)
    if q.shape is not None and v.shape is not None:
        result.shape = ir.Shape([*q.shape[:3], v.shape[3]])
    result.dtype = ir.DataType.FLOAT
    return result


def _scale(node: ir.Node) -> float | None:
    value = float_attribute(node, "scale", 0.0)
    return value or None


# --------------------------------------------------------------------------- biases


def _sum(draft: Draft, terms: list[ir.Value | None]) -> ir.Value | None:
    total = None
    for term in terms:
        total = term if total is None else draft.op("Add", total, term) if term is not None else total
    return total


def _causal(draft: Draft, q: ir.Value, k: ir.Value, filler: float, window: int = -1) -> ir.Value:
    """(S, T): ``filler`` where a key comes after its query, or ``window`` or more places before it."""
    queries = draft.op("Unsqueeze", draft.range(draft.length(q, 2)), draft.ints(1))
    keys = draft.op("Unsqueeze", draft.range(draft.length(k, 2)), draft.ints(0))
    seen = draft.op("LessOrEqual", keys, queries)
    if window > 0:
        oldest = draft.op("Sub", queries, draft.constant(np.asarray(window, np.int64), "window"))
        seen = draft.op("And", seen, draft.op("Greater", keys, oldest))
    return draft.op("Where", seen, draft.number(0.0), draft.number(filler))


def _padding(draft: Draft, mask: ir.Value, k: ir.Value, filler: float) -> ir.Value | str:
    """An additive bias out of ONNX Runtime's mask_index / key_padding_mask; a text is the reason why not."""
    rank = len(mask.shape) if mask.shape is not None else None
    if rank == 2:
        mask = draft.op("Unsqueeze", mask, draft.ints(1, 2))  # (B, T)
    elif rank == 3:
        mask = draft.op("Unsqueeze", mask, draft.ints(1))  # (B, S, T)
    elif rank != 1:
        return (
            f"a mask of rank {rank} is not handled"
            if rank is not None
            else "the rank of the mask is not known"
        )
    else:
        return _right_padding(draft, mask, k, filler)
    seen = draft.op("Cast", mask, to=int(ir.DataType.BOOL))
    return draft.op("Where", seen, draft.number(0.0), draft.number(filler))


def _right_padding(draft: Draft, lengths: ir.Value, k: ir.Value, filler: float) -> ir.Value | str:
    """A mask of rank 1: how many keys of each row are real. (2 B) and (3 B + 2) hold more and are refused."""
    rows = lengths.shape[0] if lengths.shape is not None else None
    batch = k.shape[0] if k.shape is not None else None
    if rows is None or str(rows) != str(batch):
        return "a mask of rank 1 whose length is not shown to be the batch"
    places = draft.op("Unsqueeze", draft.range(draft.length(k, 2)), draft.ints(0, 1, 2))
    ends = draft.op("Unsqueeze", draft.op("Cast", lengths, to=int(ir.DataType.INT64)), draft.ints(1, 2, 3))
    return draft.op("Where", draft.op("Less", places, ends), draft.number(0.0), draft.number(filler))


# --------------------------------------------------------------------------- com.microsoft attention


def _packed_attention(draft: Draft, node: ir.Node) -> str:
    """Attention(x, W [K, 3 N], b, mask, past, bias): one product, split in three."""
    x, weight, mask = node.inputs[0], node.inputs[1], given(node, 3)
    if given(node, 4) is not None or is_used(node, 1):
        return "it keeps past keys and values"
    if match.int_attribute(node, "do_rotary", 0) or x is None or weight is None or weight.shape is None:
        return "it rotates without tables, or its weight's shape is not known"
    heads, filler = (
        match.int_attribute(node, "num_heads", 1),
        float_attribute(node, "mask_filter_value", -1e4),
    )
    product = draft.op("MatMul", x, weight)
    biased = product if given(node, 2) is None else draft.op("Add", product, given(node, 2))
    sizes = node.attributes.get("qkv_hidden_sizes")
    total = weight.shape[-1]
    widths = list(sizes.as_ints()) if sizes is not None else [int(total) // 3] * 3  # type: ignore[arg-type]
    parts = draft.ops("Split", [biased, draft.ints(*widths)], 3, axis=-1)
    for part, width in zip(parts, widths, strict=True):
        part.shape = ir.Shape([*(x.shape[:2] if x.shape is not None else (None, None)), width])
        part.dtype = ir.DataType.FLOAT
    q, k, v = (split_heads(draft, part, heads) for part in parts)
    terms: list[ir.Value | None] = [given(node, 5)]
    if match.int_attribute(node, "unidirectional", 0):
        terms.append(_causal(draft, q, k, filler))
    return _finish(draft, (q, k, v), mask, terms, filler, _scale(node))


def _finish(
    draft: Draft,
    heads: tuple[ir.Value, ir.Value, ir.Value],
    mask: ir.Value | None,
    terms: list[ir.Value | None],
    filler: float,
    scale: float | None,
    groups: int = 1,
) -> str:
    """Attention with all its biases, merged to (B, S, H d), in place of the node; or the reason why not."""
    if mask is not None:
        padding = _padding(draft, mask, heads[1], filler)
        if isinstance(padding, str):
            return padding
        terms.append(padding)
    context = _attention(draft, heads, _sum(draft, terms), scale, groups)
    if context is None:
        return "the width of a head is not known"
    return draft.finish(merge_heads(draft, context))


def _multi_head(draft: Draft, node: ir.Node) -> str:
    """MultiHeadAttention(q, k, v, bias, key_padding_mask, attention_bias, past..): each (B, S, H d)."""
    q, k, v, bias = node.inputs[0], given(node, 1), given(node, 2), given(node, 3)
    if any(given(node, i) is not None for i in range(6, 10)) or is_used(node, 1, 2, 3):
        return "it keeps past keys and values, or its scores are read"
    if (
        q is None
        or k is None
        or v is None
        or any(x.shape is not None and len(x.shape) != 3 for x in (q, k, v))
    ):
        return "its queries, keys and values are packed in one tensor"
    heads, filler = (
        match.int_attribute(node, "num_heads", 1),
        float_attribute(node, "mask_filter_value", -1e4),
    )
    tensors = [q, k, v]
    if bias is not None:
        held = constant_array(bias)
        widths = [width_of(x) for x in tensors]
        if held is None or None in widths or sum(w for w in widths if w) != held.size:
            return "its bias is not constant, or a width is not known"
        pieces = np.split(held, np.cumsum([w for w in widths if w])[:-1])
        tensors = [
            draft.op("Add", x, draft.constant(b, "bias")) for x, b in zip(tensors, pieces, strict=True)
        ]
        for new, old in zip(tensors, (q, k, v), strict=True):
            new.shape, new.dtype = old.shape, ir.DataType.FLOAT
    split = [split_heads(draft, x, heads) for x in tensors]
    terms: list[ir.Value | None] = [given(node, 5)]
    if match.int_attribute(node, "unidirectional", 0):
        terms.append(_causal(draft, split[0], split[1], filler))
    return _finish(draft, (split[0], split[1], split[2]), given(node, 4), terms, filler, _scale(node))


def _group_query(draft: Draft, node: ir.Node) -> str:
    """GroupQueryAttention without a past: causal, right-padded, so a real query sees only real keys."""
    if given(node, 3) is not None or given(node, 4) is not None:
        return "it keeps past keys and values"
    if any(given(node, i) is not None for i in range(9, 16)) or is_used(node, 3):
        return "it has position ids, a bias, or sinks, or its scores are read"
    if float_attribute(node, "softcap", 0.0) or match.int_attribute(node, "smooth_softmax", 0) > 0:
        return "its softmax is capped or smooth"
    heads, groups = _group_heads(draft, node)
    if heads is None:
        return "the width of its packed heads is not known"
    q, k, v = heads
    if match.int_attribute(node, "do_rotary", 0):
        tables = given(node, 7), given(node, 8)
        if tables[0] is None or tables[1] is None:
            return "it rotates without tables"
        interleaved = bool(match.int_attribute(node, "rotary_interleaved", 0))
        places = draft.op("Unsqueeze", draft.range(draft.length(q, 2)), draft.ints(0))
        cos, sin = (draft.op("Gather", table, places) for table in tables)
        table_width = width_of(tables[0])
        turned = [rotated(draft, x, cos, sin, table_width, interleaved) for x in (q, k)]
        if turned[0] is None or turned[1] is None:
            return "the width of a head is not known"
        q, k = turned[0], turned[1]
    filler, window = float(MASKED), match.int_attribute(node, "local_window_size", -1)
    context = _attention(draft, (q, k, v), _causal(draft, q, k, filler, window), _scale(node), groups)
    if context is None:
        return "the width of a head is not known"
    return draft.finish(merge_heads(draft, context), k, v)


def _group_heads(draft: Draft, node: ir.Node) -> tuple[tuple[ir.Value, ir.Value, ir.Value] | None, int]:
    count, kv_count = match.int_attribute(node, "num_heads", 1), match.int_attribute(node, "kv_num_heads", 1)
    q, k, v = node.inputs[0], given(node, 1), given(node, 2)
    assert q is not None
    if k is None or v is None:
        width = width_of(q)
        if width is None:
            return None, 1
        head = width // (count + 2 * kv_count)
        sizes = [count * head, kv_count * head, kv_count * head]
        q, k, v = draft.ops("Split", [q, draft.ints(*sizes)], 3, axis=-1)
        for part, size in zip((q, k, v), sizes, strict=True):
            part.shape, part.dtype = ir.Shape([None, None, size]), ir.DataType.FLOAT
    split = (split_heads(draft, q, count), split_heads(draft, k, kv_count), split_heads(draft, v, kv_count))
    return split, count // kv_count


# --------------------------------------------------------------------------- ONNX attention


def _standard_attention(draft: Draft, node: ir.Node) -> str:
    """Attention(q, k, v, mask, past..) of ONNX 23 and 24; heads by shape (rank 4) or attribute (rank 3)."""
    if any(given(node, i) is not None for i in (4, 5, 6)) or is_used(node, 3):
        return "it keeps past keys and values, or its scores are read"
    if float_attribute(node, "softcap", 0.0):
        return "its scores are capped"
    merged = match.int_attribute(node, "q_num_heads", 0) > 0
    counts = [match.int_attribute(node, name, 0) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    heads = [as_heads(draft, x, n) for x, n in zip(node.inputs[:3], counts, strict=True) if x is not None]
    q, k, v = heads
    if q is None or k is None or v is None or q.shape is None or k.shape is None:
        return "the number of heads is not known"
    count, kv_count = q.shape[1], k.shape[1]
    if not isinstance(count, int) or not isinstance(kv_count, int):
        return "the number of heads is not known"
    terms = [_mask_bias(draft, given(node, 3))]
    if match.int_attribute(node, "is_causal", 0):
        terms.append(_causal(draft, q, k, float(MASKED)))
    context = _attention(draft, (q, k, v), _sum(draft, terms), _scale(node), count // kv_count)
    if context is None:
        return "the width of a head is not known"
    return draft.finish(merge_heads(draft, context) if merged else context, k, v)


def _mask_bias(draft: Draft, mask: ir.Value | None) -> ir.Value | None:
    if mask is None:
        return None
    if mask.dtype != ir.DataType.BOOL:
        make_finite(draft.model, mask, draft.workspace)
        return mask
    return draft.op("Where", mask, draft.number(0.0), draft.number(float(MASKED)))


MICROSOFT: dict[str, Decompose] = {
    "Attention": _packed_attention,
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _group_query,
}
STANDARD: dict[str, Decompose] = {"Attention": _standard_attention}
