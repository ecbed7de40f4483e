"""Interval rules of operators that make values: of sizes, of ranges, of nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.proof import spans
from qcompile.proof.moved import dims_of
from qcompile.proof.spans import Dims, Span, ends, exactly
from qcompile.proof.step import Rule, Step, UnreadableError


def _shape(step: Step) -> list[Span]:
    dims = dims_of(step.x())
    start, stop = step.number("start", 0), step.number("end", len(dims))
    part = dims[slice(start, stop)]
    needs = spans.NOTHING.union(*(dim.needs for dim in part))
    return [
        spans.span(step.dtype(), (exactly(len(part)),), ends([d.lo for d in part]), ends([d.top for d in part]), needs)
    ]


def _size(step: Step) -> list[Span]:
    count = spans.product(dims_of(step.x()))
    return [spans.between(step.dtype(), (), count.lo, min(count.top, spans.LARGEST_DIM), count.needs)]


def _range(step: Step) -> list[Span]:
    start, limit, delta = step.x(0), step.x(1), step.known(2)[0]
    if delta == 0:
        raise UnreadableError("a step of 0")
    low, high = (start.least, limit.most - 1) if delta > 0 else (limit.least + 1, start.most)
    far = limit.most - start.least if delta > 0 else start.most - limit.least
    near = limit.least - start.most if delta > 0 else start.least - limit.most
    needs = spans.needs_of(step.ins)
    size = spans.sized(-(-near // abs(delta)), -(-far // abs(delta)), needs)
    low, high = (low, max(low, high)) if delta > 0 else (min(low, high), high)
    return [step.fitted((size,), ends([low]), ends([high]))]


def _constant_of_shape(step: Step) -> list[Span]:
    shape = step.x()
    count = None if not shape.dims else shape.dims[0].size
    dims: Dims | None = None
    if count is not None:
        lows, highs = (np.broadcast_to(end, (count,)) for end in (shape.lo, shape.hi))
        dims = tuple(spans.sized(low, high, shape.needs) for low, high in zip(lows, highs, strict=True))
    value = step.node.attributes.get("value")
    if value is None or not spans.is_integer(step.dtype()):
        return [spans.full(step.dtype(), dims)]
    filler = int(value.as_tensor().numpy().reshape(-1)[0])
    return [spans.between(step.dtype(), dims, filler, filler, shape.needs)]


def _constant(step: Step) -> list[Span]:
    for name, read in (("value_int", ir.Attr.as_int), ("value_ints", ir.Attr.as_ints)):
        attribute = step.node.attributes.get(name)
        if attribute is not None:
            return [spans.constant(np.array(read(attribute), np.int64), ir.DataType.INT64)]
    value = step.node.attributes.get("value")
    if value is None:
        return [spans.full(step.dtype(), step.inferred[0])]
    tensor = value.as_tensor()
    return [spans.constant(tensor.numpy(), tensor.dtype)]


RULES: dict[str, Rule] = {
    "Shape": _shape,
    "Size": _size,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Constant": _constant,
}
