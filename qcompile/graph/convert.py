"""Opset conversion in the IR itself: weights are neither loaded nor serialised, so 2 GB is no limit.

Opsets 13 to 17 are lifted to 18 by the adapters below (the only operators whose spelling changed); from there
the converter of onnxscript takes over. Newer opsets than the canonical one are left as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from qcompile.errors import UserError
from qcompile.graph.provenance import inherit

CANONICAL_OPSET = 21
OLDEST_OPSET = 13
NEWEST_OPSET = 26  # what ONNX Runtime 1.31 reads
CANONICAL_IR_VERSION = 10  # the first with 4-bit types and metadata of nodes
NEWEST_IR_VERSION = 13

_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSumSquare",
)  # fmt: skip


def opset_of(model: ir.Model) -> int:
    """The version of the default operator domain that ``model`` imports; UserError when it imports none."""
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if version is None:
        raise UserError("the model imports no ONNX operator set", hint="is it a complete ONNX file?")
    return version


def check_opset(model: ir.Model) -> None:
    """Refuse opsets that are outside what the compiler and ONNX Runtime read."""
    version = opset_of(model)
    if version < OLDEST_OPSET:
        raise UserError(
            f"the model has opset {version}; opsets {OLDEST_OPSET} to {NEWEST_OPSET} are supported",
            hint=f"export it again with opset {CANONICAL_OPSET}",
        )
    if version > NEWEST_OPSET:
        raise UserError(
            f"the model has opset {version}; ONNX Runtime reads at most {NEWEST_OPSET}",
            hint=f"export it again with opset {CANONICAL_OPSET}",
        )


def to_canonical_opset(model: ir.Model) -> None:
    """Lift ``model`` (functions inlined) to opset 21 when it is older; set the IR version that it needs."""
    version = opset_of(model)
    if version < 18:
        _lift_to_18(model)
    if version < CANONICAL_OPSET:
        _lift_from_18(model)
    model.opset_imports.pop("ai.onnx", None)
    model.graph.opset_imports[""] = max(version, CANONICAL_OPSET)
    model.ir_version = ir_version_for(max(version, CANONICAL_OPSET))


def ir_version_for(opset: int) -> int:
    """The oldest IR version that may carry ``opset``, and at least 10."""
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    return min(max(needed, CANONICAL_IR_VERSION), NEWEST_IR_VERSION)


def _lift_from_18(model: ir.Model) -> None:
    from onnxscript import version_converter

    for node in model.graph.all_nodes():
        node.version = None  # take the model's
    logger = logging.getLogger("onnxscript.version_converter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        version_converter.convert_version(model, CANONICAL_OPSET)
    finally:
        logger.setLevel(level)


def _lift_to_18(model: ir.Model) -> None:
    for node in list(model.graph.all_nodes()):
        adapter = _ADAPTERS.get(node.op_type) if node.domain == "" else None
        if adapter is not None:
            adapter(node)
    model.graph.opset_imports[""] = 18


def _axes_to_input(node: ir.Node) -> None:
    """Reduce*(x, axes=[..]) -> Reduce*(x, axes): the attribute became the second input in opset 18."""
    axes = node.attributes.pop("axes", None)
    if axes is not None:
        constant = _int64_constant(node, list(axes.as_ints()), "axes")
        node.resize_inputs(2)
        node.replace_input_with(1, constant)


def _state_num_outputs(node: ir.Node) -> None:
    """Split(x) into equal parts must state how many since opset 18."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _keep_roi_mode(node: ir.Node) -> None:
    """RoiAlign's default coordinate transformation changed in opset 16."""
    if "coordinate_transformation_mode" not in node.attributes:
        name = "coordinate_transformation_mode"
        node.attributes[name] = ir.AttrString(name, "output_half_pixel")


def _int64_constant(node: ir.Node, values: list[int], role: str) -> ir.Value:
    """A Constant node before ``node``: it works in subgraphs too, and capture lifts it to an initializer."""
    tensor = ir.tensor(np.array(values, dtype=np.int64))
    constant = ir.node("Constant", [], attributes={"value": tensor})
    constant.outputs[0].name = f"{node.outputs[0].name}_{role}"
    inherit(constant, node)
    assert node.graph is not None
    node.graph.insert_before(node, constant)
    return constant.outputs[0]


_ADAPTERS: dict[str, Callable[[ir.Node], None]] = {
    **dict.fromkeys(_REDUCTIONS, _axes_to_input),
    "Split": _state_num_outputs,
    "RoiAlign": _keep_roi_mode,
}
