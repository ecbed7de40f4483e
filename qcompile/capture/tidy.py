"""Clean-up passes of capture that the library lacks."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

FOLD_ELEMENTS = 1024  # shape arithmetic and small masks; weights are never folded
_GROWING = ("ConstantOfShape", "Expand", "Tile", "Range")
_BROADCASTING = ("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where")
_MADE_UP = "unk__"  # how the names begin that inference gives to sizes that it does not know


class RemoveDropout(ir.passes.InPlacePass):
    """Dropout(x) -> x: a compiled model is for inference, whatever training_mode says."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        removed = 0
        for node in list(model.graph.all_nodes()):
            mask_is_used = len(node.outputs) > 1 and any(True for _ in node.outputs[1].uses())
            if node.domain == "" and node.op_type == "Dropout" and not mask_is_used:
                to_identity(node)
                removed += 1
        return ir.passes.PassResult(model, bool(removed))


class FoldSmallConstants(ir.passes.InPlacePass):
    """Constant folding that leaves weights alone: only small tensors are read and made."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        from onnxscript import optimizer

        result = optimizer.fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=FOLD_ELEMENTS,
            output_size_limit=FOLD_ELEMENTS,
            should_fold=_should_fold,
        )
        return ir.passes.PassResult(model, bool(result))


def _should_fold(node: ir.Node) -> bool | None:
    """False for weights (a folded Transpose unties an embedding) and for results of unknown or large size."""
    if node.op_type in _GROWING and not _is_small(node.outputs[0]):
        return False
    return False if any(_is_weight(value) for value in node.inputs) else None


def _is_weight(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None else None
    return (
        tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) >= 2 and tensor.size > 1
    )


def _is_small(value: ir.Value) -> bool:
    shape = value.shape
    return shape is not None and shape.is_static() and _elements(shape) <= FOLD_ELEMENTS


def _elements(shape: ir.Shape) -> int:
    count = 1
    for size in shape.numpy():
        count *= size
    return count


def to_identity(node: ir.Node) -> None:
    """Replace ``node`` by Identity of its first input, which IdentityEliminationPass removes."""
    graph = node.graph
    assert graph is not None
    identity = ir.node("Identity", [node.inputs[0]], name=node.name)
    identity.metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [identity], node.outputs[:1], identity.outputs
    )


class ForgetDoubtfulShapes(ir.passes.InPlacePass):
    """Shapes in a file that stand in the way of what inference finds by itself.

    Sizes that an earlier inference made up a name for (``unk__3``), and shapes of constants other than their own, of
    which a single one stops all inference.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        forgotten = 0
        for value in model.graph.initializers.values():
            if value.const_value is not None and value.shape != value.const_value.shape:
                value.shape = ir.Shape(value.const_value.shape.numpy())
                forgotten += 1
        for value in (value for node in model.graph for value in node.outputs):
            sizes = [None if _known(dim) is None else dim for dim in value.shape or ()]
            if sizes != list(value.shape or ()) and not value.is_graph_output():
                value.shape = ir.Shape(sizes)
                forgotten += 1
        return ir.passes.PassResult(model, bool(forgotten))


class FoldSizes(ir.passes.InPlacePass):
    """Gather(Shape(x), i) -> the size, where it is a number: torch's older exporter spells ``x.shape[i]`` so."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        folded = 0
        for node in list(model.graph):
            size = _gathered_size(node)
            if size is not None:
                constant = ir.node("Constant", [], {"value": ir.AttrTensor("value", ir.tensor(size))}, name=node.name)
                constant.metadata_props.update(node.metadata_props)
                outputs = constant.outputs
                ir.convenience.replace_nodes_and_values(model.graph, node, [node], [constant], node.outputs, outputs)
                folded += 1
        return ir.passes.PassResult(model, bool(folded))


def _gathered_size(node: ir.Node) -> np.ndarray | None:
    """int64 like the index of ``node``; None where it gathers no size that is known."""
    source = node.inputs[0].producer() if node.op_type == "Gather" and node.inputs[0] is not None else None
    index = node.inputs[1].const_value if source is not None and node.inputs[1] is not None else None
    if source is None or source.op_type != "Shape" or index is None or source.inputs[0] is None:
        return None
    shape, place = source.inputs[0].shape, index.numpy()
    if shape is None or place.ndim or "start" in source.attributes or "end" in source.attributes:
        return None
    size = shape[int(place)] if -len(shape) <= int(place) < len(shape) else None
    return np.array(size, np.int64) if isinstance(size, int) else None


class SolveReshapes(ir.passes.InPlacePass):
    """Fill in the one size of a Reshape's result that inference leaves open: (B, S, C) -> (B, S, ?, d) has C / d.

    Inference knows the number of heads only where B and S are numbers. What a matrix (K, N) multiplies has K columns,
    which tells the width of heads that are put together again.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        solved = 0
        for node in model.graph:
            if node.domain == "" and node.op_type == "Reshape" and node.inputs[0] is not None:
                shape = _solved(node.inputs[0].shape, node.outputs[0].shape) or _multiplied(node.outputs[0])
                if shape is not None:
                    node.outputs[0].shape = shape
                    solved += 1
        return ir.passes.PassResult(model, bool(solved))


def _solved(before: ir.Shape | None, after: ir.Shape | None) -> ir.Shape | None:
    """``after`` with its one open size as a number, where the other sizes say it; names stand for equal sizes."""
    if before is None or after is None:
        return None
    left, kept = [_size(dim) for dim in before], [_size(dim) for dim in after]
    open_axes = []
    for axis, size in enumerate(kept):
        if not isinstance(size, int):
            if size is not None and size in left:
                left.remove(size)
            else:
                open_axes.append(axis)
    if len(open_axes) != 1 or not all(isinstance(size, int) for size in left):
        return None
    known = math.prod(size for size in kept if isinstance(size, int))
    whole, rest = divmod(math.prod(left), known) if known else (0, 1)  # type: ignore[arg-type]
    if rest:
        return None
    return ir.Shape([whole if axis == open_axes[0] else dim for axis, dim in enumerate(after)])


class SolveBroadcasts(ir.passes.InPlacePass):
    """Name the sizes that inference leaves open where an axis with a name meets one without.

    (batch, H, sequence, d) cos (1, 1, ?, d): for texts of all lengths ? is 1 or ``sequence``, and so is the result.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        solved = 0
        for node in model.graph:
            if node.domain == "" and node.op_type in _BROADCASTING and node.outputs[0].shape is not None:
                shape = _met(node.outputs[0].shape, [v.shape for v in node.inputs if v is not None])
                if shape is not None:
                    node.outputs[0].shape = shape
                    solved += 1
        return ir.passes.PassResult(model, bool(solved))


def _met(after: ir.Shape, before: list[ir.Shape | None]) -> ir.Shape | None:
    """``after`` with names on its open axes, where the operands have one name and no number but 1; None for no news."""
    sizes = [_known(dim) for dim in after]
    if None not in sizes or None in before:
        return None
    for axis, size in enumerate(sizes):
        place = axis - len(sizes)
        met = {_known(shape[place]) for shape in before if shape is not None and len(shape) >= -place}
        names = met - {None, 1}
        if size is None and len(names) == 1 and isinstance(name := names.pop(), str):
            sizes[axis] = name
    return ir.Shape(sizes) if any(s != _known(dim) for s, dim in zip(sizes, after, strict=True)) else None


def _known(dim: int | ir.SymbolicDim) -> int | str | None:
    """The size of ``dim``; None too where inference made up a name for it."""
    size = _size(dim)
    return None if str(size).startswith(_MADE_UP) else size


def _multiplied(value: ir.Value) -> ir.Shape | None:
    """The shape of ``value`` with its last size, where only the matrix that multiplies it tells that."""
    if value.shape is None or not len(value.shape) or isinstance(value.shape[-1], int):
        return None
    for use in value.uses():
        matrix = use.node.inputs[1] if use.node.op_type == "MatMul" and use.idx == 0 else None
        weight = matrix.const_value if matrix is not None else None
        if weight is not None and len(weight.shape) == 2:
            return ir.Shape([*value.shape[:-1], weight.shape.numpy()[0]])
    return None


def _size(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value
