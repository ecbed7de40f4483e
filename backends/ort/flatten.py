"""Token tensors (B, S, C) become matrices (B*S, C) wherever every operator works row by row.

    x (B, S, C) -> norm, linear, activation, residual ...  ->  Reshape(x, [-1, C]) -> the same in rank 2
A Reshape back stands only where another operator reads the tensor. Two reasons: quantising with one scale
for each row needs rank 2, and ONNX Runtime turns a rank-3 residual Add + LayerNormalization into its
SkipLayerNormalization, a scalar loop that is slower than the two alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompile.backends.ort.emit import put_node
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.functions import is_op
from qcompile.graph.workspace import Workspace

_NORMS = ("LayerNormalization", "RMSNormalization")
_UNARY = ("Gelu", "Silu", "Relu", "Tanh", "Sigmoid", "Identity", "Dropout")
_PER_TOKEN = ("FakeQuantizePerToken", "FakeQuantizePerTokenSymmetric", "ClipTokens")
_BINARY = ("Add", "Sub", "Mul", "Div", "Max", "Min")
_STATIC = ("QuantizeLinear", "DequantizeLinear")


def rewrite(model: ir.Model, workspace: Workspace) -> int:
    """Flatten every row-wise region; returns how many nodes now work in rank 2."""
    with _inferred_outputs(model):
        region = {id(node): node for node in model.graph if _is_row_wise(node)}
        _leave_lonely(region)
        flattener = _Flattener(model, workspace, region)
        for node in list(region.values()):
            flattener.enter(node)
        for node in list(region.values()):
            flattener.leave(node)
    return len(region)


@contextlib.contextmanager
def _inferred_outputs(model: ir.Model) -> Iterator[None]:
    """The outputs with the shapes that inference finds: the caller's, which come back, may leave out the width."""
    outputs = model.graph.outputs
    declared = [value.shape for value in outputs]
    vague = [v for v in outputs if v.shape is None or (len(v.shape) == 3 and not isinstance(v.shape[2], int))]
    for value in vague:
        value.shape = None
    if vague:
        common.NameFixPass()(model)  # what was lowered so far may have taken a name twice
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    yield
    for value, shape in zip(outputs, declared, strict=True):
        value.shape = shape


# --------------------------------------------------------------------------- which nodes


def _is_row_wise(node: ir.Node) -> bool:
    tokens = [v for v in node.inputs if v is not None and constant_array(v) is None]
    if not tokens or any(_width(v) is None for v in (tokens[0], *node.outputs)):
        return False
    if is_op(node, *_BINARY, "Clip"):
        return _is_elementwise(node, tokens)
    if len(tokens) > 1 and not (is_op(node, "MatMul") and _is_weight(node.inputs[1])):
        return False
    if is_op(node, *_UNARY, *_PER_TOKEN):
        return True
    if is_op(node, *_NORMS):
        return len(node.outputs) == 1 and match.int_attribute(node, "axis", -1) in (-1, 2)
    if is_op(node, "MatMul"):
        return node.inputs[0] is tokens[0]
    if is_op(node, *_STATIC):
        return node.inputs[0] is tokens[0] and _keeps_axis(node)
    return is_op(node, "Split") and match.int_attribute(node, "axis", 0) in (-1, 2)


def _is_weight(value: ir.Value | None) -> bool:
    """A matrix that is constant, or made of constants by DequantizeLinear and Transpose."""
    while (node := match.producer(value, "DequantizeLinear", "Transpose")) is not None:
        value = node.inputs[0]
    array = constant_array(value)
    return array is not None and array.ndim == 2


def _is_elementwise(node: ir.Node, tokens: list[ir.Value]) -> bool:
    constants = [a for v in node.inputs if v is not None and (a := constant_array(v)) is not None]
    return all(a.ndim <= 1 for a in constants) and all(_same_shape(v, node.outputs[0]) for v in tokens)


def _keeps_axis(node: ir.Node) -> bool:
    scale = constant_array(node.inputs[1])
    if scale is None:
        return False
    return scale.size == 1 or (scale.ndim == 1 and match.int_attribute(node, "axis", 1) in (-1, 2))


def _width(value: ir.Value) -> int | None:
    """C of a value (B, S, C) whose last axis is known."""
    shape = value.shape
    if shape is None or len(shape) != 3 or not isinstance(shape[2], int):
        return None
    return shape[2]


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return all(_dim(x) is not None and _dim(x) == _dim(y) for x, y in zip(a.shape, b.shape, strict=True))


def _dim(dim: object) -> object:
    return dim.value if isinstance(dim, ir.SymbolicDim) else dim


def _leave_lonely(region: dict[int, ir.Node]) -> None:
    """Drop nodes that touch no linear, norm or per-token quantisation: a lone mask Add gains nothing."""
    seeds = (*_NORMS, *_PER_TOKEN, "MatMul")
    wanted = [node for node in region.values() if is_op(node, *seeds)]
    keep: set[int] = set()
    while wanted:
        node = wanted.pop()
        if id(node) in keep:
            continue
        keep.add(id(node))
        wanted.extend(n for n in _neighbours(node) if id(n) in region)
    for key in set(region) - keep:
        del region[key]


def _neighbours(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.inputs:
        if value is not None and (source := value.producer()) is not None:
            yield source
    for output in node.outputs:
        yield from match.consumers(output)


# --------------------------------------------------------------------------- the rewrite


class _Flattener:
    """Puts the Reshapes at the borders of ``region`` and changes the shapes inside it."""

    def __init__(self, model: ir.Model, workspace: Workspace, region: dict[int, ir.Node]) -> None:
        self.model, self.workspace, self.region = model, workspace, region
        self.flat: dict[int, ir.Value] = {}
        self.roots: dict[int, ir.Value] = {}  # value inside the region -> the rank-3 value it came from
        self.leading: dict[object, ir.Value] = {}
        self.shapes: dict[tuple[int, int], ir.Value] = {}

    def enter(self, node: ir.Node) -> None:
        """Let ``node`` read matrices."""
        root = None
        for index, value in enumerate(node.inputs):
            if value is None or constant_array(value) is not None or _is_weight(value):
                continue
            source = value.producer()
            if source is not None and id(source) in self.region:
                root = root or self.roots[id(value)]
                continue
            node.replace_input_with(index, self._flattened(value, node))
            root = root or value
        assert root is not None
        for output in node.outputs:
            self.roots[id(output)] = root
        if "axis" in node.attributes and not _is_scalar_quantiser(node):
            node.attributes["axis"] = ir.AttrInt64("axis", -1)

    def leave(self, node: ir.Node) -> None:
        """Give the readers outside the region the tensor of rank 3; note the new shape."""
        for output in node.outputs:
            outside = [(use.node, use.idx) for use in output.uses() if id(use.node) not in self.region]
            width = _width(output)
            assert width is not None
            rank3 = output.shape
            output.shape = ir.Shape([None, width])
            if outside or output.is_graph_output():
                self._unflatten(output, outside, width, rank3)

    def _flattened(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if id(value) not in self.flat:
            width = _width(value)
            assert width is not None
            target = new_initializer(self.model, "rows", np.array([-1, width], np.int64), self.workspace)
            rows = put_node(reader, "", "Reshape", [value, target], f"{value.name}.rows").outputs[0]
            rows.type, rows.shape = value.type, ir.Shape([None, width])
            self.flat[id(value)] = rows
        return self.flat[id(value)]

    def _unflatten(
        self, output: ir.Value, outside: list[tuple[ir.Node, int]], width: int, rank3: ir.Shape | None
    ) -> None:
        node = output.producer()
        assert node is not None
        shape = self._shape(self.roots[id(output)], width)
        name = output.name
        back = put_node(node, "", "Reshape", [output, shape], f"{name}.tokens", after=True).outputs[0]
        back.type, back.shape = output.type, rank3
        for reader, index in outside:
            reader.replace_input_with(index, back)
        outputs = self.model.graph.outputs
        for index, value in enumerate(outputs):
            if value is output:
                output.name, back.name = f"{name}.rows", name
                outputs[index] = back

    def _shape(self, root: ir.Value, width: int) -> ir.Value:
        """[B, S, width], computed once for each root and width, right after the root exists."""
        leading = self._leading(root)
        key = (id(leading), width)
        if key not in self.shapes:
            held = new_initializer(self.model, "width", np.array([width], np.int64), self.workspace)
            made = leading.producer()
            assert made is not None
            axis, name = [ir.AttrInt64("axis", 0)], f"{leading.name}.{width}"
            value = put_node(made, "", "Concat", [leading, held], name, axis, after=True).outputs[0]
            value.dtype, value.shape = ir.DataType.INT64, ir.Shape([3])
            self.shapes[key] = value
        return self.shapes[key]

    def _leading(self, root: ir.Value) -> ir.Value:
        """[B, S] of ``root``; one for all roots with the same named dimensions."""
        assert root.shape is not None
        names = tuple(_dim(d) for d in list(root.shape)[:2])
        key: object = id(root) if None in names else names
        if key not in self.leading:
            source = self._first_with(names) if None not in names else root
            span = [ir.AttrInt64("start", 0), ir.AttrInt64("end", 2)]
            source = source if source is not None else root
            made = source.producer()
            anchor = made if made is not None else next(iter(self.model.graph))
            inputs, name = [source], f"{source.name}.leading"
            value = put_node(anchor, "", "Shape", inputs, name, span, after=made is not None).outputs[0]
            value.dtype, value.shape = ir.DataType.INT64, ir.Shape([2])
            self.leading[key] = value
        return self.leading[key]

    def _first_with(self, names: tuple[object, ...]) -> ir.Value | None:
        """A graph input whose first two dimensions are ``names``: its shape is known from the start."""
        for value in self.model.graph.inputs:
            if value.shape is not None and tuple(_dim(d) for d in list(value.shape)[:2]) == names:
                return value
        return None


def _is_scalar_quantiser(node: ir.Node) -> bool:
    scale = constant_array(node.inputs[1]) if is_op(node, *_STATIC) else None
    return scale is not None and scale.size == 1
