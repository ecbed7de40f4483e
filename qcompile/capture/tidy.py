"""Clean-up passes of capture that the library lacks."""

from __future__ import annotations

import onnx_ir as ir

FOLD_ELEMENTS = 1024  # shape arithmetic and small masks; weights are never folded
_GROWING = ("ConstantOfShape", "Expand", "Tile", "Range")


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
