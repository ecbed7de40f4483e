"""Where the channels of a value go: index arithmetic on the graph's own layout operators.

Fused projections hold their heads in many orders ((heads, 3, d), (3, heads, d), groups). None is assumed: a
tensor of indices is pushed through the Reshape, Transpose, Split, Slice, Gather, Expand and Concat nodes that
the graph really has, with small numbers in place of the dynamic axes.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array
from qcompile.graph.functions import is_op

_SMALL = (2, 3, 5, 7, 11, 13, 17, 19)
_LARGE = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079)  # no constant axis has these sizes
_MAX_ELEMENTS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A reader that is no layout operator (nor Shape).

    ``codes``: for every element that it reads, the flat index in the start.
    ``passed``: operators on the way that are more than layout: "Mul" by one number, "RotaryEmbedding".
    """

    node: ir.Node | None  # None: the value is an output of the graph
    index: int
    codes: np.ndarray
    passed: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Trace:
    """All readers of a value, and the pairs of elements that a rotary embedding mixes on the way."""

    shape: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    mixed: np.ndarray  # (pairs, 2), flat indices in the start


class Dimensions:
    """Small numbers for symbolic axes: the same symbol is the same number, expressions are computed."""

    def __init__(self, numbers: Sequence[int] = _SMALL) -> None:
        self._numbers = numbers
        self._held: dict[str, int] = {}

    def shape(self, value: ir.Value) -> tuple[int, ...] | None:
        """The shape with numbers, -1 for an axis without a name; None when two are missing, or the rank."""
        if value.shape is None:
            return None
        numbers = tuple(self.number(d) for d in value.shape)
        return None if numbers.count(-1) > 1 else numbers

    def number(self, dimension: int | ir.SymbolicDim) -> int:
        if isinstance(dimension, int):
            return dimension
        text = dimension.value
        if text is None:
            return -1
        if text not in self._held:
            computed = self._computed(text)
            self._held[text] = (
                computed if computed is not None else self._numbers[len(self._held) % len(self._numbers)]
            )
        return self._held[text]

    def _computed(self, text: str) -> int | None:
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError:
            return None
        if isinstance(tree, ast.Name):
            return None
        return self._evaluate(tree)

    def _evaluate(self, tree: ast.expr) -> int | None:
        if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
            return tree.value
        if isinstance(tree, ast.Name):
            return self.number(ir.SymbolicDim(tree.id))
        if isinstance(tree, ast.BinOp) and type(tree.op) in _ARITHMETIC:
            left, right = self._evaluate(tree.left), self._evaluate(tree.right)
            if left is None or right is None or (right == 0 and isinstance(tree.op, ast.FloorDiv)):
                return None
            return int(_ARITHMETIC[type(tree.op)](left, right))
        return None


_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


def same_shape(left: Iterable[int | ir.SymbolicDim], right: Iterable[int | ir.SymbolicDim]) -> bool:
    """Whether two lists of axes are equal, expressions of the same symbols included."""
    dimensions = Dimensions(_LARGE)
    numbers = [[dimensions.number(d) for d in axes] for axes in (left, right)]
    return numbers[0] == numbers[1] and -1 not in numbers[0]


def follow(start: ir.Value) -> Trace | None:
    """Every reader of ``start`` behind layout operators; None when the shape of ``start`` is not known."""
    dimensions = Dimensions()
    shape = dimensions.shape(start)
    if shape is None or -1 in shape or not 0 < int(np.prod(shape)) <= _MAX_ELEMENTS:
        return None
    return _Walk(start, np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape), dimensions).trace()


class _Walk:
    def __init__(self, start: ir.Value, codes: np.ndarray, dimensions: Dimensions) -> None:
        self._shape = codes.shape
        self._dimensions = dimensions
        self._held: dict[int, tuple[np.ndarray, frozenset[str]]] = {}
        self._leaves: list[Leaf] = []
        self._joins: dict[int, list[tuple[ir.Node, int]]] = {}
        self._mixed: list[np.ndarray] = []
        self._pending = [start]
        self._held[id(start)] = (codes, frozenset())

    def trace(self) -> Trace:
        while self._pending:
            self._visit(self._pending.pop())
        for waiting in self._joins.values():  # a Concat with operands from elsewhere
            for node, index in waiting:
                self._leaf(node, index, node.inputs[index])
        mixed = np.concatenate(self._mixed) if self._mixed else np.zeros((0, 2), np.int64)
        return Trace(self._shape, tuple(self._leaves), mixed)

    def _visit(self, value: ir.Value) -> None:
        if value.is_graph_output():
            self._leaf(None, 0, value)
        for use in value.uses():
            if is_op(use.node, "Concat"):
                self._join(use.node, use.idx)
            elif not is_op(use.node, "Shape") and not self._step(use.node, use.idx, value):
                self._leaf(use.node, use.idx, value)

    def _leaf(self, node: ir.Node | None, index: int, value: ir.Value | None) -> None:
        codes, passed = self._held[id(value)]
        self._leaves.append(Leaf(node, index, codes, passed))

    def _join(self, node: ir.Node, index: int) -> None:
        waiting = self._joins.setdefault(id(node), [])
        waiting.append((node, index))
        if len(waiting) < len(node.inputs):
            return
        del self._joins[id(node)]
        parts = [self._held[id(value)] for value in node.inputs]
        axis = match.int_attribute(node, "axis", -1)
        passed = frozenset().union(*(p for _, p in parts))
        self._hold(node.outputs[0], np.concatenate([codes for codes, _ in parts], axis), passed)

    def _hold(self, value: ir.Value, codes: np.ndarray, passed: frozenset[str]) -> None:
        self._held[id(value)] = (codes, passed)
        self._pending.append(value)

    def _step(self, node: ir.Node, index: int, value: ir.Value) -> bool:
        codes, passed = self._held[id(value)]
        if is_op(node, "RotaryEmbedding") and index == 0:
            half = codes.shape[-1] // 2
            self._mixed.append(np.stack([codes[..., :half].reshape(-1), codes[..., half:].reshape(-1)], 1))
            self._hold(node.outputs[0], codes, passed | {"RotaryEmbedding"})
            return True
        if is_op(node, "Mul", "Div"):
            other = match.scalar(node.inputs[1 - index])
            if other is None or (node.op_type == "Div" and index == 1):
                return False
            self._hold(node.outputs[0], codes, passed | {"Mul"})
            return True
        if index != 0 or node.domain not in ("", "ai.onnx") or node.op_type not in _LAYOUT:
            return False
        results = _LAYOUT[node.op_type](node, codes, self._dimensions)
        if results is None:
            return False
        for output, result in zip(node.outputs, results, strict=True):
            self._hold(output, result, passed)
        return True


# ------------------------------------------------------------------- layout operators on index tensors

_Results = Sequence[np.ndarray] | None


def _reshape(node: ir.Node, codes: np.ndarray, dimensions: Dimensions) -> _Results:
    target = _stated_shape(node, codes)
    shape = target if target is not None else dimensions.shape(node.outputs[0])
    try:
        return [codes.reshape(shape)] if shape is not None else None
    except ValueError:
        return None


def _stated_shape(node: ir.Node, codes: np.ndarray) -> tuple[int, ...] | None:
    """The constant second input of Reshape, 0 meaning the input's axis."""
    held = constant_array(node.inputs[1])
    if held is None:
        return None
    zero_is_zero = match.int_attribute(node, "allowzero", 0)
    return tuple(
        codes.shape[i] if n == 0 and not zero_is_zero and i < codes.ndim else int(n)
        for i, n in enumerate(held.tolist())
    )


def _expand(node: ir.Node, codes: np.ndarray, dimensions: Dimensions) -> _Results:
    shape = dimensions.shape(node.outputs[0])
    try:
        return [np.broadcast_to(codes, shape)] if shape is not None and -1 not in shape else None
    except ValueError:
        return None


def _transpose(node: ir.Node, codes: np.ndarray, _: Dimensions) -> _Results:
    return [codes.transpose(list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else None)]


def _split(node: ir.Node, codes: np.ndarray, _: Dimensions) -> _Results:
    axis = match.int_attribute(node, "axis", 0)
    sizes = constant_array(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if sizes is not None:
        return np.split(codes, np.cumsum(sizes)[:-1], axis)
    each = -(-codes.shape[axis] // len(node.outputs))
    return np.split(codes, [each * (i + 1) for i in range(len(node.outputs) - 1)], axis)


def _slice(node: ir.Node, codes: np.ndarray, _: Dimensions) -> _Results:
    held = [constant_array(v) if v is not None else None for v in node.inputs[1:]]
    given = [v is not None for v in node.inputs[1:]]
    if any(g and h is None for g, h in zip(given, held, strict=True)) or len(held) < 2:
        return None
    starts, ends = (np.asarray(h).tolist() for h in held[:2])
    axes = held[2].tolist() if len(held) > 2 and held[2] is not None else list(range(len(starts)))
    steps = held[3].tolist() if len(held) > 3 and held[3] is not None else [1] * len(starts)
    cut = [slice(None)] * codes.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            return None
        cut[axis] = slice(start, end, step)
    return [codes[tuple(cut)]]


def _gather(node: ir.Node, codes: np.ndarray, _: Dimensions) -> _Results:
    indices = constant_array(node.inputs[1])
    return [np.take(codes, indices, match.int_attribute(node, "axis", 0))] if indices is not None else None


def _gather_nd(node: ir.Node, codes: np.ndarray, _: Dimensions) -> _Results:
    indices = constant_array(node.inputs[1])
    if indices is None or match.int_attribute(node, "batch_dims", 0) or indices.shape[-1] != 1:
        return None
    return [np.take(codes, indices[..., 0], 0)]


def _squeeze(node: ir.Node, codes: np.ndarray, _: Dimensions) -> _Results:
    axes = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    return [np.squeeze(codes, tuple(axes.tolist()))] if axes is not None else None


def _unsqueeze(node: ir.Node, codes: np.ndarray, _: Dimensions) -> _Results:
    axes = constant_array(node.inputs[1])
    return [np.expand_dims(codes, tuple(axes.tolist()))] if axes is not None else None


def _same(_node: ir.Node, codes: np.ndarray, _: Dimensions) -> _Results:
    return [codes]


_LAYOUT: dict[str, Callable[[ir.Node, np.ndarray, Dimensions], _Results]] = {
    "Reshape": _reshape,
    "Expand": _expand,
    "Transpose": _transpose,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Identity": _same,
}
