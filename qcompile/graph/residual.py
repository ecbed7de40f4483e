"""Residual streams: the values that blocks add to and norms read, with everything that writes or reads them.

A stream is what Adds and layout operators connect. An orthogonal matrix on its channels folds into the graph when
every writer is linear (embeddings, projections, constants, a patch convolution) and every reader a norm that feeds
linears alone: norm(x) before its gain does not feel a rotation of x. Post-LN models put a norm's output, gain and
all, back into the stream, so nothing folds there. Source: QuaRot (arXiv 2404.00456), section 3; SliceGPT (2401.15024).
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array
from qcompile.graph.functions import is_op
from qcompile.graph.linears import Linear, find_experts, find_linears
from qcompile.graph.provenance import layer_name, original_name
from qcompile.graph.readers import Other, keeps_last_axis, readers, table_readers
from qcompile.graph.sites import NORMS
from qcompile.graph.trace import same_shape

_SUMS = ("ReduceSum", "ReduceMean")
_LAYOUT = ("Identity", "Dropout", "Reshape", "Slice", "Gather", "GatherND", "Expand", "Unsqueeze", "Squeeze")


@dataclasses.dataclass(frozen=True)
class NormReader:
    """A norm on the stream and the linears (experts included) that read it."""

    node: ir.Node
    linears: tuple[Linear, ...]


@dataclasses.dataclass(frozen=True)
class Stream:
    """A residual stream of ``width`` channels, called after its first norm.

    linears: write it with their outputs; direct: read it without a norm between
    constants: (node, input) whose last axis is the stream's channels: looked-up tables, positions, a class token
    patches: convolutions whose output channels are the stream's
    scaled: products of a looked-up table with one number for each channel, which a fold in front of a tied head leaves
    reason: why it cannot be rotated, because of ``node``; empty when it can
    """

    name: str
    width: int
    norms: tuple[NormReader, ...]
    linears: tuple[Linear, ...]
    direct: tuple[Linear, ...]
    constants: tuple[tuple[ir.Node, int], ...]
    patches: tuple[ir.Node, ...]
    scaled: tuple[ir.Node, ...] = ()
    reason: str = ""
    node: ir.Node | None = None

    @property
    def centred(self) -> bool:
        """Whether its norms are LayerNorms, which take the mean off what they read."""
        return any(is_op(norm.node, "LayerNormalization") for norm in self.norms)

    @property
    def tied_heads(self) -> list[Linear]:
        """The heads among the readers that share their table with an embedding."""
        return [linear for norm in self.norms for linear in norm.linears if linear.transposed]


def find_streams(model: ir.Model) -> list[Stream]:
    """The stream in front of every norm that feeds a linear, each once, in graph order."""
    known = {id(linear.node): linear for linear in [*find_linears(model.graph), *find_experts(model.graph)]}
    seen: set[int] = set()
    found = []
    for node in model.graph:
        start = node.inputs[0] if is_op(node, *NORMS) else None
        if start is None or id(start) in seen or not norm_readers(node.outputs[0], known)[0]:
            continue
        flood = _Flood(known)
        found.append(flood.stream(start, layer_name(node)))
        seen |= flood.seen
    return found


def norm_readers(value: ir.Value, known: dict[int, Linear]) -> tuple[list[Linear], list[Other]]:
    """As ``readers.readers``, and seen through a multiplication by one number (T5's head)."""
    linears, others = readers(value, known)
    left = []
    for other in others:
        factor = row_factor(other.node, other.index) if other.node is not None else None
        if other.node is None or match.scalar(factor) is None:
            left.append(other)
            continue
        below, beside = norm_readers(other.node.outputs[0], known)
        linears, left = linears + below, left + beside
    return linears, left


class _Flood:
    """Everything that is connected to one value of a stream."""

    def __init__(self, known: dict[int, Linear]) -> None:
        self._known = known
        self._products = {id(linear.output): linear for linear in known.values()}
        self.seen: set[int] = set()
        self._norms: list[NormReader] = []
        self._linears: list[Linear] = []
        self._direct: list[Linear] = []
        self._constants: list[tuple[ir.Node, int]] = []
        self._patches: list[ir.Node] = []
        self._scaled: list[ir.Node] = []
        self._obstacle: tuple[str, ir.Node | None] | None = None

    def stream(self, start: ir.Value, name: str) -> Stream:
        width = _width(start)
        if width is None:
            reason = "its width is not known"
            return Stream(name, 0, (), (), (), (), (), reason=reason, node=start.producer())
        pending = [start]
        while pending:
            value = pending.pop()
            if id(value) in self.seen:
                continue
            self.seen.add(id(value))
            if _width(value) != width:
                self._refuse("its width is not known everywhere", value.producer())
                continue
            pending += [*self._above(value), *self._below(value)]
        self._check_norms()
        reason, node = self._obstacle or ("", None)
        return Stream(
            name, width, tuple(self._norms), tuple(self._linears), tuple(self._direct), tuple(self._constants),
            tuple(self._patches), tuple(self._scaled), reason, node,
        )  # fmt: skip

    def _refuse(self, reason: str, node: ir.Node | None) -> None:
        self._obstacle = self._obstacle or (reason, node)

    def _check_norms(self) -> None:
        kinds = {norm.node.op_type for norm in self._norms}
        if len(kinds) > 1:
            self._refuse("norms that take the mean off and norms that do not read it", self._norms[0].node)
        if self._direct and "LayerNormalization" in kinds:
            self._refuse("a linear reads it with the mean that LayerNorms take off", self._direct[0].node)

    # ------------------------------------------------------------------------------ writers

    def _above(self, value: ir.Value) -> list[ir.Value]:
        """The values of the stream that ``value`` is made of; a writer is noted and ends the way."""
        linear, node = self._products.get(id(value)), value.producer()
        if linear is not None:
            self._linears.append(linear)
            return []
        if node is None:
            kind = "input" if constant_array(value) is None else "constant"
            self._refuse(f"{kind} '{value.name}' of the model is part of it", None)
            return []
        patches = _patch_convolution(node)
        if patches is not None:
            self._patches.append(patches)
            return []
        lookup = scaled_lookup(node)
        if lookup is not None:
            self._scaled.append(node)
            self._constants.append((lookup, 0))
            return []
        found = []
        for index in _carriers(node, value) or self._unknown_writer(node):
            operand = node.inputs[index]
            assert operand is not None
            if constant_array(operand) is None:
                found.append(operand)
            elif _width(operand) == _width(value):
                self._constants.append((node, index))
            else:
                self._refuse("a constant with one number for all channels is added to it", node)
        return found

    def _unknown_writer(self, node: ir.Node) -> tuple[int, ...]:
        if is_op(node, *NORMS):
            where = "post-LN" if self._is_behind_a_linear(node) else "behind the embeddings"
            self._refuse(f"a norm with a gain writes it ({where}), which does not commute with a rotation", node)
        else:
            self._refuse(f"{node.op_type} writes it, which does not commute with a rotation", node)
        return ()

    def _is_behind_a_linear(self, node: ir.Node) -> bool:
        pending, seen = [node], {id(node)}
        while pending:
            for value in pending.pop().inputs:
                above = match.producer(value)
                if id(value) in self._products:
                    return True
                if above is not None and id(above) not in seen:
                    seen.add(id(above))
                    pending.append(above)
        return False

    # ------------------------------------------------------------------------------ readers

    def _below(self, value: ir.Value) -> list[ir.Value]:
        """The values of the stream made from ``value``; a reader is noted and ends the way."""
        if value.is_graph_output():
            self._refuse("it is an output of the model", value.producer())
        found = []
        for use in value.uses():
            linear = self._known.get(id(use.node))
            if linear is not None and use.idx == 0:
                self._direct.append(linear)
            elif is_op(use.node, *NORMS) and use.idx == 0:
                self._norm(use.node)
            elif use.idx in (_carriers(use.node, use.node.outputs[0]) or ()):
                found.append(use.node.outputs[0])
            elif not is_op(use.node, "Shape"):
                self._refuse(f"{use.node.op_type} reads it, which does not commute with a rotation", use.node)
        return found

    def _norm(self, node: ir.Node) -> None:
        linears, others = norm_readers(node.outputs[0], self._known)
        last = is_op(node, "RMSNormalization") or match.int_attribute(node, "axis", -1) in (-1, _rank(node) - 1)
        self._norms.append(NormReader(node, tuple(linears)))
        if others:
            reader = others[0].node
            what = reader.op_type if reader is not None else "an output of the model"
            after = " (post-LN)" if _is_post_ln(reader) else ""
            self._refuse(f"the norm on it feeds {what} beside linears{after}, where its gain cannot follow", node)
        elif not last or any(constant_array(v) is None for v in node.inputs[1:] if v is not None):
            self._refuse("a norm on it has a gain that is computed at run time, or more than one axis", node)
        elif any(linear.chosen for linear in linears) and is_op(node, "LayerNormalization"):
            self._refuse("the offset of a norm on it would need a bias for each expert", node)
        elif any(linear.transposed and table_readers(linear) is None for linear in linears):
            self._refuse("more than lookups and the tied head read the head's table", node)


def _is_post_ln(node: ir.Node | None) -> bool:
    """Whether ``node``, or what a fold left between, adds a norm's output to another value for the next norm alone."""
    while node is not None and is_op(node, "Mul", "Add") and match.constant_operand(node) is not None:
        node = match.only_consumer(node.outputs[0])
    return node is not None and is_op(node, "Add") and match.only_consumer(node.outputs[0], *NORMS) is not None


def _carriers(node: ir.Node, value: ir.Value) -> tuple[int, ...] | None:
    """The inputs of ``node`` whose channels are those of its output ``value`` (times a number for each row)."""
    last = len(value.shape or ()) - 1
    if len(node.outputs) != 1 or not node.inputs or node.inputs[0] is None:
        return None
    if is_op(node, "Add", "Sub"):
        return (0, 1)
    if is_op(node, "Mul", "Div"):
        return next(((i,) for i in (0, 1) if row_factor(node, i) is not None), None)
    if is_op(node, "Concat"):
        return None if match.int_attribute(node, "axis", -1) in (-1, last) else tuple(range(len(node.inputs)))
    if is_op(node, "Transpose"):
        perm = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else []
        return (0,) if perm and perm[-1] == last else None
    if is_op(node, *_SUMS):
        axes = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        inner = axes is not None and not {-1, len(node.inputs[0].shape or ()) - 1} & set(axes.reshape(-1).tolist())
        return (0,) if inner else None
    return (0,) if is_op(node, *_LAYOUT) and keeps_last_axis(node, 0, node.inputs[0]) else None


def row_factor(node: ir.Node, index: int) -> ir.Value | None:
    """What Mul or Div scales the rows of its operand ``index`` by, one number each; None when it is no such node."""
    if not is_op(node, "Mul", "Div") or (node.op_type == "Div" and index == 1):
        return None
    factor = node.inputs[1 - index]
    if factor is None or factor.shape is None or (len(factor.shape) and factor.shape[-1] != 1):
        return None
    return factor


def scaled_lookup(node: ir.Node) -> ir.Node | None:
    """The lookup in a constant table (..., C) whose rows alone ``node`` multiplies by a constant (C,)."""
    found = match.constant_operand(node) if is_op(node, "Mul") else None
    lookup = match.producer(found[0], "Gather") if found is not None else None
    if found is None or lookup is None or match.only_consumer(lookup.outputs[0]) is not node:
        return None
    table = constant_array(lookup.inputs[0])
    if table is None or table.ndim < 2 or found[1].shape != table.shape[-1:]:
        return None
    return lookup if 0 <= match.int_attribute(lookup, "axis", 0) < table.ndim - 1 else None


def _patch_convolution(node: ir.Node) -> ir.Node | None:
    """The convolution (B, C, h, w) whose flat output (B, C, h * w) ``node`` transposes to (B, h * w, C)."""
    if not is_op(node, "Transpose") or list(node.attributes["perm"].as_ints()) != [0, 2, 1]:
        return None
    flat = match.producer(node.inputs[0], "Reshape", "Flatten")
    convolution = match.producer(flat.inputs[0], "Conv") if flat is not None else None
    if flat is None or convolution is None or match.only_consumer(convolution.outputs[0]) is not flat:
        return None
    before, after = convolution.outputs[0].shape, flat.outputs[0].shape
    if before is None or after is None or len(after) != 3 or not same_shape(before[:2], after[:2]):
        return None
    constant = all(constant_array(v) is not None for v in convolution.inputs[1:] if v is not None)
    return convolution if constant and match.int_attribute(convolution, "group", 1) == 1 else None


def _width(value: ir.Value) -> int | None:
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None


def _rank(node: ir.Node) -> int:
    value = node.outputs[0]
    return len(value.shape) if value.shape is not None else 0


def describe(stream: Stream) -> str:
    """The stream in the user's names, for reports."""
    return f"residual:{stream.name or original_name(stream.norms[0].node)}"
