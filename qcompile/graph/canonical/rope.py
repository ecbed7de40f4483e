"""Rotary position embedding with rotated halves (arXiv 2104.09864, LLaMA's layout).

x cos + concat(-x[d/2:], x[:d/2]) sin   ->  qcompile.RotaryEmbedding(x, cos, sin)
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array
from qcompile.graph.functions import DOMAIN, use


def rewrite(model: ir.Model) -> int:
    """Recognise every rotary embedding; returns how many."""
    return sum(_rewrite(model, node) for node in match.nodes(model.graph, "Concat"))


def _rewrite(model: ir.Model, concat: ir.Node) -> int:
    x = _rotated(concat)
    by_sin = match.only_consumer(concat.outputs[0], "Mul")
    total = match.only_consumer(by_sin.outputs[0], "Add") if by_sin is not None else None
    if x is None or by_sin is None or total is None:
        return 0
    by_cos = match.producer(match.other_operand(total, by_sin.outputs[0]), "Mul")
    sin = match.other_operand(by_sin, concat.outputs[0])
    cos = match.other_operand(by_cos, x) if by_cos is not None else None
    if cos is None or sin is None:
        return 0
    use(model, "RotaryEmbedding")
    sources = [n for v in total.inputs if v is not None and (n := v.producer()) is not None]
    match.put_instead(total, match.new_node(DOMAIN, "RotaryEmbedding", [x, cos, sin], {}, [total]))
    match.remove_dead(model.graph, sources)
    return 1


def _rotated(concat: ir.Node) -> ir.Value | None:
    """x if ``concat`` is (-second half of x, first half of x) along the last axis."""
    if len(concat.inputs) != 2 or match.int_attribute(concat, "axis", -1) not in (-1, 3):
        return None
    negated = match.producer(concat.inputs[0], "Neg")
    if negated is None:
        return None
    second, first = negated.inputs[0], concat.inputs[1]
    split = match.producer(first, "Split")
    if split is not None and match.producer(second) is split and len(split.outputs) == 2:
        return split.inputs[0] if split.outputs[0] is first and split.outputs[1] is second else None
    low, high = _slice(first), _slice(second)
    if low is None or high is None or low[0] is not high[0]:
        return None
    x, width = low[0], _width(low[0])
    if width is None or low[1:] != (0, width // 2) or high[1] != width // 2 or high[2] < width:
        return None
    return x


def _width(x: ir.Value) -> int | None:
    return int(x.shape[-1]) if x.shape is not None and isinstance(x.shape[-1], int) else None


def _slice(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """(source, start, end) of a Slice of the last axis with step 1."""
    node = match.producer(value, "Slice")
    if node is None or len(node.inputs) < 4 or node.inputs[0] is None:
        return None
    start, end, axis = (match.scalar(v) for v in node.inputs[1:4])
    step = (
        match.scalar(node.inputs[4])
        if len(node.inputs) > 4 and constant_array(node.inputs[4]) is not None
        else 1.0
    )
    if start is None or end is None or axis not in (-1.0, 3.0) or step != 1.0:
        return None
    return node.inputs[0], int(start), int(min(end, 2**62))


# --------------------------------------------------------------------------- what is almost a rotation


def misses(graph: ir.Graph) -> list[match.Unrecognised]:
    """Rotations but for one detail: (-b, a) of two parts of one value, or (a c - b s, b c + a s)."""
    found = ((node, _detail(node)) for node in match.nodes(graph, "Concat") if len(node.inputs) == 2)
    return [match.Unrecognised(node, f"not seen as a rotary embedding: {why}") for node, why in found if why]


def _detail(concat: ir.Node) -> str:
    parts = [match.through(value, "Unsqueeze") for value in concat.inputs]
    interleaved = "its pairs are neighbours (even, odd), not halves"
    if _turned(*parts):
        return interleaved if parts[0] is not concat.inputs[0] else "it is written by halves, without a rotated copy"
    negated = [match.producer(part, "Neg") for part in parts]
    sources = [_part_of(n.inputs[0] if n is not None else part) for n, part in zip(negated, parts, strict=True)]
    if (negated[0] is None) == (negated[1] is None) or sources[0] is None or sources[0] is not sources[1]:
        return ""
    if parts[0] is not concat.inputs[0]:
        return interleaved
    if negated[0] is None:
        return "the first half is negated, not the second"
    if _rotated(concat) is None:
        return "what it joins are not the two halves of the last axis"
    by_sin = match.only_consumer(concat.outputs[0], "Mul")
    if by_sin is None:
        return "its rotated copy has another reader, or is not multiplied"
    return "it is not the sum of x cos and a rotated copy times sin, read once"


def _part_of(value: ir.Value | None) -> ir.Value | None:
    node = match.producer(value, "Slice", "Split", "Gather")
    return node.inputs[0] if node is not None else None


def _turned(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether these are a c - b s and b c + a s."""
    minus, plus = match.producer(first, "Sub"), match.producer(second, "Add")
    products = [match.producer(v, "Mul") for n in (minus, plus) if n is not None for v in n.inputs]
    if len(products) != 4 or any(n is None for n in products):
        return False
    ac, bs, *rest = ({id(v) for v in n.inputs} for n in products if n is not None)
    return all(len(r & ac) == len(r & bs) == 1 for r in rest) and set.union(*rest) == ac | bs
