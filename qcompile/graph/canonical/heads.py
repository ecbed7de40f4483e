"""Heads (B, H, S, d) out of (B, S, H d) and back, for the operators that are taken apart."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.canonical.draft import Draft, width_of
from qcompile.graph.edits import constant_array


def split_heads(draft: Draft, x: ir.Value, heads: int) -> ir.Value:
    """(B, S, H d) -> (B, H, S, d)."""
    whole = _merged_from(x, heads)
    if whole is not None:
        return whole
    rows = draft.op("Reshape", x, draft.ints(0, 0, heads, -1))
    result = draft.op("Transpose", rows, perm=[0, 2, 1, 3])
    width = width_of(x)
    lead = [x.shape[0], x.shape[1]] if x.shape is not None and len(x.shape) == 3 else [None, None]
    result.shape = ir.Shape([lead[0], heads, lead[1], width // heads if width is not None else None])
    result.dtype = ir.DataType.FLOAT
    return result


def _merged_from(x: ir.Value, heads: int) -> ir.Value | None:
    """(B, H, S, d) if ``x`` is that, merged by ``merge_heads``."""
    reshape = match.producer(x, "Reshape")
    transpose = match.producer(reshape.inputs[0], "Transpose") if reshape is not None else None
    source = transpose.inputs[0] if transpose is not None else None
    if (
        reshape is None
        or transpose is None
        or source is None
        or source.shape is None
        or len(source.shape) != 4
    ):
        return None
    target = constant_array(reshape.inputs[1])
    straight = list(transpose.attributes["perm"].as_ints()) == [0, 2, 1, 3]
    return (
        source
        if straight and target is not None and target.tolist() == [0, 0, -1] and source.shape[1] == heads
        else None
    )


def merge_heads(draft: Draft, x: ir.Value) -> ir.Value:
    """(B, H, S, d) -> (B, S, H d)."""
    return draft.op("Reshape", draft.op("Transpose", x, perm=[0, 2, 1, 3]), draft.ints(0, 0, -1))


def as_heads(draft: Draft, x: ir.Value, heads: int) -> ir.Value | None:
    if x.shape is not None and len(x.shape) == 4:
        return x
    return split_heads(draft, x, heads) if heads else None
