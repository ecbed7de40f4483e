"""Random integer programs for the soundness test: whatever ONNX Runtime computes must lie in its interval."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qcompile.calibration.runner import open_session
from qcompile.proof.intervals import Intervals, find_intervals
from qcompile.proof.prepared import prepared

ROWS, WIDTH = 4, 3  # of the input: up to 4 rows (the dynamic dim B) of 3 columns
EDGES = (-(2**31), 2**31 - 1, -(2**31) + 1, -65536, -129, -128, -3, -2, -1, 0, 1, 2, 3, 7, 127, 128, 255, 65535, 2**30)
FULL, ROW, COLUMN, ONE = "full", "row", "column", "one"  # (B, 3), (1, 3), (B, 1), a single number

_number = st.one_of(st.sampled_from(EDGES), st.integers(-40, 40), st.integers(-(2**31), 2**31 - 1))
_small = st.integers(-9, 9)


@dataclasses.dataclass
class Builder:
    """A graph under construction; every value is int32 and broadcasts with every other."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    constants: list[onnx.TensorProto] = dataclasses.field(default_factory=list)
    constant_kinds: dict[str, str] = dataclasses.field(default_factory=dict)
    kinds: dict[str, str] = dataclasses.field(default_factory=lambda: {"x": FULL, "z": FULL})

    def constant(self, array: Any, dtype: type = np.int32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def keep(self, name: str, kind: str) -> None:
        self.kinds[name] = kind

    def any(self, *kinds: str) -> str:
        name: str = self.draw(st.sampled_from([n for n, k in self.kinds.items() if not kinds or k in kinds]))
        return name

    def numbers(self, elements: st.SearchStrategy[int] = _number) -> str:
        """A constant: one number, or one a column."""
        size = self.draw(st.sampled_from([(), (WIDTH,), (1, WIDTH)]))
        count = int(np.prod(size))
        values = self.draw(st.lists(elements, min_size=count, max_size=count))
        name = self.constant(np.array(values).reshape(size))
        self.constant_kinds[name] = ROW if size else ONE
        return name

    def clipped(self, name: str, low: int, high: int) -> str:
        lower = self.op("Max", name, self.constant(low))
        return str(self.op("Min", lower, self.constant(high)))

    def divisor(self) -> str:
        """A value or constant that is nowhere 0 (nor -1: INT_MIN / -1 traps)."""
        if self.draw(st.booleans()):
            return self.numbers(st.one_of(st.integers(1, 2**31 - 1), st.integers(1, 9), st.integers(-(2**31), -2)))
        source = self.any()
        positive = self.draw(st.booleans())
        name: str = self.op("Max" if positive else "Min", source, self.constant(1 if positive else -2))
        self.constant_kinds[name] = self.kinds[source]
        return name

    def joint(self, *names: str) -> str:
        """The kind of an elementwise result."""
        kinds = {{**self.constant_kinds, **self.kinds}.get(name, ONE) for name in names} - {ONE}
        return FULL if len(kinds) > 1 else kinds.pop() if kinds else ONE


Snippet = Callable[[Builder], None]


def _clip(b: Builder) -> None:
    x = b.any()
    low, high = sorted((b.draw(_number), b.draw(_number)))
    b.keep(b.clipped(x, low, high), b.kinds[x])


def _small_clip(b: Builder) -> None:
    x = b.any()
    low, high = sorted((b.draw(st.integers(-2000, 2000)), b.draw(st.integers(-2000, 2000))))
    b.keep(b.clipped(x, low, high), b.kinds[x])


def _binary(b: Builder) -> None:
    x = b.any()
    y = b.any() if b.draw(st.booleans()) else b.numbers(b.draw(st.sampled_from([_number, _small])))
    kind = b.draw(st.sampled_from(["Add", "Sub", "Mul", "Min", "Max", "BitwiseAnd", "BitwiseOr", "BitwiseXor"]))
    x, y = b.draw(st.permutations([x, y]))
    b.keep(b.op(kind, x, y), b.joint(x, y))


def _unary(b: Builder) -> None:
    x = b.any()
    b.keep(b.op(b.draw(st.sampled_from(["Neg", "Abs", "Sign", "BitwiseNot", "Identity", "Relu"])), x), b.kinds[x])


def _division(b: Builder) -> None:
    x, y = b.any(), b.divisor()
    kind, fmod = b.draw(st.sampled_from([("Div", {}), ("Mod", {}), ("Mod", {"fmod": 1})]))
    b.keep(b.op(kind, x, y, **fmod), b.joint(x, y))


def _related(b: Builder) -> None:
    """The relations that the analysis knows."""
    x = b.any()
    how = b.draw(st.sampled_from(["mod", "fmod", "quotient", "largest", "least", "flat", "square", "reversed"]))
    if how in ("mod", "fmod", "quotient"):
        c = b.divisor()
        y = b.op("Mod", x, c, fmod=int(how == "fmod")) if how != "quotient" else b.op("Mul", c, b.op("Div", x, c))
        b.keep(b.op("Sub", x, y), b.joint(x, c))
    elif how == "square":
        b.keep(b.op("Mul", x, x), b.kinds[x])
    else:
        kind = "ReduceMin" if how == "least" else "ReduceMax"
        x = b.any(FULL)
        m = b.op(kind, x, b.constant([0 if how == "flat" else -1], np.int64), keepdims=int(how != "flat"))
        b.keep(b.op("Sub", m, x) if how == "reversed" else b.op("Sub", x, m), FULL)


def _reduction(b: Builder) -> None:
    x = b.any(FULL)
    axis = b.draw(st.sampled_from([0, 1, -1]))
    kind = b.draw(st.sampled_from(["ReduceSum", "ReduceMax", "ReduceMin"]))
    b.keep(b.op(kind, x, b.constant([axis], np.int64)), ROW if axis == 0 else COLUMN)


def _choice(b: Builder) -> None:
    x, y, p, q = b.any(), b.any(), b.any(), b.any()
    other = b.numbers() if b.draw(st.booleans()) else y
    c = b.op(b.draw(st.sampled_from(["Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"])), x, other)
    made = [x, other]
    if b.draw(st.booleans()):
        c = b.op(b.draw(st.sampled_from(["And", "Or", "Xor"])), c, b.op("Not", b.op("Less", y, x)))
        made.append(y)
    b.keep(b.op("Where", c, p, q), b.joint(*made, p, q))
    b.keep(b.op("Cast", c, to=TensorProto.INT32), b.joint(*made))


def _cast(b: Builder) -> None:
    x = b.any()
    types = [
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.INT16,
        TensorProto.UINT16,
        TensorProto.INT64,
        TensorProto.UINT32,
        TensorProto.BOOL,
    ]
    b.keep(b.op("Cast", b.op("Cast", x, to=b.draw(st.sampled_from(types))), to=TensorProto.INT32), b.kinds[x])


def _wide(b: Builder) -> None:
    """A product in int64, brought back by a division."""
    x = b.any()
    p, q = (b.op("Cast", name, to=TensorProto.INT64) for name in (x, x))
    y = b.op("Div", b.op("Mul", p, q), b.constant(b.draw(st.sampled_from([2**31, 2**32, 1000])), np.int64))
    b.keep(b.op("Cast", y, to=TensorProto.INT32), b.kinds[x])


def _shift(b: Builder) -> None:
    x, y = b.any(), b.any()
    base = b.op("Cast", b.clipped(x, 0, b.draw(st.sampled_from([15, 2**16, 2**31 - 1]))), to=TensorProto.UINT32)
    amount = b.op("Cast", b.clipped(y, 0, b.draw(st.integers(0, 31))), to=TensorProto.UINT32)
    shifted = b.op("BitShift", base, amount, direction=b.draw(st.sampled_from(["LEFT", "RIGHT"])))
    b.keep(b.op("Cast", shifted, to=TensorProto.INT32), b.joint(x, y))


def _power(b: Builder) -> None:
    x = b.any()
    b.keep(b.op("Pow", b.clipped(x, -1000, 1000), b.constant(b.draw(st.integers(0, 3)))), b.kinds[x])


def _table(b: Builder) -> None:
    x = b.any()
    size = b.draw(st.integers(1, 6))
    table = b.constant(b.draw(st.lists(_number, min_size=size, max_size=size)))
    low = b.draw(st.integers(-size, size - 1))
    index = b.clipped(x, low, b.draw(st.integers(low, size - 1)))
    b.keep(b.op("Gather", table, index), b.kinds[x])


def _lookup(b: Builder) -> None:
    x, y = b.any(FULL), b.any(FULL)
    if b.draw(st.booleans()):
        b.keep(b.op("GatherElements", x, b.clipped(y, -WIDTH, WIDTH - 1), axis=1), FULL)
    else:
        places = b.draw(st.lists(st.integers(-WIDTH, WIDTH - 1), min_size=WIDTH, max_size=WIDTH))
        b.keep(b.op("Gather", x, b.constant(places, np.int64), axis=1), FULL)


def _layout(b: Builder) -> None:
    x, y = b.any(FULL), b.any(FULL)
    how = b.draw(st.sampled_from(["transpose", "flatten", "split", "slice", "reverse", "pad", "unsqueeze", "tile"]))
    if how == "transpose":
        t = b.op("Transpose", x)
        t = b.op("Add", t, b.constant(np.arange(WIDTH).reshape(WIDTH, 1)))
        b.keep(b.op("Transpose", t), FULL)
    elif how == "flatten":
        flat = b.op("Reshape", x, b.constant([0, WIDTH, 1], np.int64))
        flat = b.op("Reshape", flat, b.constant([-1], np.int64))
        b.keep(b.op("Reshape", flat, b.constant([-1, WIDTH], np.int64)), FULL)
    elif how == "split":
        first, second = b.op("Split", b.op("Concat", x, y, axis=-1), outputs=2, axis=-1, num_outputs=2)
        b.keep(first, FULL)
        b.keep(second, FULL)
    elif how in ("slice", "reverse"):
        step = 1 if how == "slice" else -1
        start = b.draw(st.integers(0, WIDTH)) + (0 if step == 1 else WIDTH - 1)
        stop = start + WIDTH * step
        stop = stop if stop >= 0 else -(2**62)
        ends = [b.constant([n], np.int64) for n in (start, stop, 1, step)]
        b.keep(b.op("Slice", b.op("Concat", x, y, axis=1), *ends), FULL)
    elif how == "pad":
        padded = b.op("Pad", x, b.constant([0, 1, 0, 2], np.int64), b.constant(b.draw(_number)))
        ends = [b.constant([n], np.int64) for n in (b.draw(st.integers(0, 3)), 10, 1)]
        first = b.op("Slice", padded, *ends)
        b.keep(b.op("ReduceSum", first, b.constant([1], np.int64)), COLUMN)
    elif how == "tile":
        tiled = b.op("Tile", x, b.constant([2, 1], np.int64))
        b.keep(b.op("ReduceSum", tiled, b.constant([0], np.int64)), ROW)
    else:
        u = b.op("Unsqueeze", x, b.constant([0, 2], np.int64))
        e = b.op("Expand", u, b.constant([1, 1, 2, 1], np.int64))
        s = b.op("ReduceSum", e, b.constant([2], np.int64), keepdims=1)
        b.keep(b.op("Squeeze", s, b.constant([0, 2], np.int64)), FULL)


def _joined_rows(b: Builder) -> None:
    """A concatenation along the dynamic dim, summed over."""
    x, y = b.any(FULL), b.any(FULL)
    b.keep(b.op("ReduceSum", b.op("Concat", x, y, axis=0), b.constant([0], np.int64)), ROW)


def _running(b: Builder) -> None:
    x = b.any(FULL)
    how = {name: b.draw(st.integers(0, 1)) for name in ("exclusive", "reverse")}
    b.keep(b.op("CumSum", x, b.constant(b.draw(st.integers(0, 1)), np.int64), **how), FULL)


def _place(b: Builder) -> None:
    x = b.any(FULL)
    best = b.op("ArgMax", x, axis=b.draw(st.integers(0, 1)), keepdims=0)
    b.keep(b.op("Cast", b.op("ReduceMax", best, b.constant([0], np.int64)), to=TensorProto.INT32), ONE)
    values, _ = b.op("TopK", x, b.constant([b.draw(st.integers(1, WIDTH))], np.int64), outputs=2)
    b.keep(b.op("ReduceMin", values, b.constant([1], np.int64)), COLUMN)


def _product(b: Builder) -> None:
    x = b.any(FULL)
    codes, low, high = b.draw(st.sampled_from([(TensorProto.UINT8, 0, 255), (TensorProto.INT8, -128, 127)]))
    a = b.op("Cast", b.clipped(x, low, high), to=codes)
    dtype = np.uint8 if codes == TensorProto.UINT8 else np.int8
    weights = b.draw(st.lists(st.integers(-128, 127), min_size=WIDTH**2, max_size=WIDTH**2))
    inputs = [a, b.constant(np.array(weights).reshape(WIDTH, WIDTH), np.int8)]
    if b.draw(st.booleans()):
        inputs.append(b.constant(b.draw(st.integers(low, high)), dtype))
        if b.draw(st.booleans()):
            inputs.append(b.constant(b.draw(st.lists(st.integers(-9, 9), min_size=WIDTH, max_size=WIDTH)), np.int8))
    b.keep(b.op("MatMulInteger", *inputs), FULL)


def _free_product(b: Builder) -> None:
    """A product of two activations: over the columns, and over the dynamic dim."""
    x, y = b.any(FULL), b.any(FULL)
    p, q = (b.op("Cast", b.clipped(name, 0, 255), to=TensorProto.UINT8) for name in (x, y))
    scores = b.op("MatMulInteger", p, b.op("Transpose", q))
    b.keep(b.op("ReduceMax", scores, b.constant([1], np.int64)), COLUMN)
    codes = b.op("Cast", b.clipped(scores, 0, 255), to=TensorProto.UINT8)
    b.keep(b.op("MatMulInteger", codes, q), FULL)


def _int_product(b: Builder) -> None:
    weights = b.draw(st.lists(_number, min_size=WIDTH**2, max_size=WIDTH**2))
    b.keep(b.op("MatMul", b.any(FULL), b.constant(np.array(weights).reshape(WIDTH, WIDTH))), FULL)


def _triangle(b: Builder) -> None:
    b.keep(b.op("Trilu", b.any(FULL), upper=b.draw(st.integers(0, 1))), FULL)


def _scatter(b: Builder) -> None:
    x, y, i = b.any(FULL), b.any(FULL), b.any(FULL)
    index = b.op("ArgMax", i, axis=1, keepdims=1)
    updates = b.op("ReduceMax", y, b.constant([1], np.int64))
    b.keep(b.op("ScatterElements", x, index, updates, axis=1), FULL)


def _sizes(b: Builder) -> None:
    """Numbers that come from the sizes themselves."""
    shape = b.op("Shape", b.any(FULL))
    rows = b.op("Gather", shape, b.constant(0, np.int64))
    places = b.op("Range", b.constant(0, np.int64), rows, b.constant(1, np.int64))
    column = b.op("Unsqueeze", places, b.constant([1], np.int64))
    b.keep(b.op("Cast", column, to=TensorProto.INT32), COLUMN)
    filled = b.op("ConstantOfShape", shape, value=numpy_helper.from_array(np.array([b.draw(_number)], np.int32)))
    b.keep(filled, FULL)


SNIPPETS: tuple[Snippet, ...] = (
    _small_clip, _clip, _binary, _binary, _unary, _division, _related, _reduction, _choice, _cast, _wide, _shift,
    _power, _table, _lookup, _layout, _joined_rows, _running, _place, _product, _free_product, _int_product,
    _triangle, _scatter, _sizes,
)  # fmt: skip


@st.composite
def graphs(draw: Any) -> tuple[onnx.ModelProto, int]:
    """A program of a few snippets that returns every value it makes, and a seed for what it is fed."""
    b = Builder(draw)
    for name in ("x", "z"):  # start from intervals that are not the type's own
        if draw(st.booleans()):
            low = b.op("Max", name, b.numbers())
            b.keep(b.op("Min", low, b.numbers()), FULL)
    for snippet in draw(st.lists(st.sampled_from(SNIPPETS), min_size=2, max_size=7)):
        snippet(b)
    ports = [helper.make_tensor_value_info(name, TensorProto.INT32, ["B", WIDTH]) for name in ("x", "z")]
    outputs = [onnx.ValueInfoProto(name=name) for node in b.nodes for name in node.output]
    graph = helper.make_graph(b.nodes, "g", ports, outputs, b.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model, draw(st.integers(0, 2**16))


def analysed(model: onnx.ModelProto) -> Intervals:
    ready = prepared(ir.from_proto(model), "test")
    assert not ready.findings, ready.findings
    return find_intervals(ready.model, {"B": ROWS})


def _feeds(seed: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    made = []
    for rows, reach in itertools.product((1, ROWS), (3, 300, 2**31)):
        made.append({n: random.integers(-reach, reach, (rows, WIDTH)).astype(np.int32) for n in ("x", "z")})
    made += [{n: random.choice(np.array(EDGES, np.int32), (ROWS, WIDTH)) for n in ("x", "z")} for _ in range(4)]
    return made


def violations(model: onnx.ModelProto, seed: int) -> list[str]:
    """Values that ONNX Runtime computes outside of their intervals or sizes."""
    found = analysed(model)
    unreadable = [one for one in found.findings if one.kind in ("operator", "divisor", "shift", "index", "unbounded")]
    assert not unreadable, unreadable  # the snippets guard against these
    spans = {str(value.name): span for value, span in found.spans.items()}
    session = open_session(model.SerializeToString(), threads=1, level="basic")
    names = [port.name for port in session.get_outputs()]
    wrong = []
    for feeds in _feeds(seed):
        for name, array in zip(names, session.run(names, feeds), strict=True):
            span = spans[name]
            exact = array.astype(object)
            if not (np.all(exact >= span.lo) and np.all(exact <= span.hi)):
                wrong.append(f"{name}: {array.tolist()} outside {span.lo.tolist()}..{span.hi.tolist()}")
            assert span.dims is not None and len(span.dims) == array.ndim, name
            if not all(dim.lo <= n <= dim.top for dim, n in zip(span.dims, array.shape, strict=True)):
                wrong.append(f"{name}: shape {array.shape} outside {span.dims}")
    return wrong
