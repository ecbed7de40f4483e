"""A mixture of experts whose matrices stand in one table: a row times the expert chosen for it.

    MatMul(GatherND(W [E, N, K], e), Unsqueeze(x, -1)) -> Squeeze(-1)
        ->  Squeeze(MatMul(Unsqueeze(x, 1), Gather(W' [E, K, N], e)), 1)

The same product as everywhere else, x on the left, so that one rule scales it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.canonical.draft import Draft
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.workspace import Workspace


def rewrite(model: ir.Model, workspace: Workspace) -> int:
    """Bring every product with a chosen matrix to one spelling; returns how many."""
    return sum(_rewrite(model, node, workspace) for node in match.nodes(model.graph, "MatMul"))


def _rewrite(model: ir.Model, product: ir.Node, workspace: Workspace) -> int:
    choice, column = (
        match.producer(product.inputs[0], "GatherND", "Gather"),
        match.producer(product.inputs[1], "Unsqueeze"),
    )
    squeeze = match.only_consumer(product.outputs[0], "Squeeze")
    if choice is None or column is None or squeeze is None:
        return 0
    table, x = constant_array(choice.inputs[0]), column.inputs[0]
    rows = _chosen_rows(choice)
    last = (-1.0, 2.0)
    if table is None or table.ndim != 3 or rows is None or x is None or choice.inputs[0] is None:
        return 0
    if match.scalar(column.inputs[1]) not in last or match.scalar(squeeze.inputs[1]) not in last:
        return 0
    held = new_initializer(model, f"{choice.inputs[0].name}_experts", np.swapaxes(table, 1, 2), workspace)
    held.metadata_props.update(choice.inputs[0].metadata_props)
    _write(Draft(model, squeeze, workspace), product, held, rows, x)
    match.remove_dead(model.graph, [product])
    return 1


def _write(draft: Draft, product: ir.Node, table: ir.Value, rows: ir.Value, x: ir.Value) -> None:
    matrices = draft.op("Gather", table, rows, axis=0)
    draft.node, squeeze = product, draft.node
    row = draft.op("Unsqueeze", x, draft.ints(1))
    draft.node = squeeze
    result = draft.op("MatMul", row, matrices)
    _copy_names(result, product)
    shapes = (x.shape, table.shape, squeeze.outputs[0].shape)
    if all(s is not None for s in shapes):
        tokens, width = x.shape[0], squeeze.outputs[0].shape[-1]  # type: ignore[index]
        matrices.shape = ir.Shape([tokens, *table.shape[1:]])  # type: ignore[index]
        row.shape, result.shape = ir.Shape([tokens, 1, x.shape[-1]]), ir.Shape([tokens, 1, width])  # type: ignore[index]
    for value in (row, matrices, result):
        value.dtype = ir.DataType.FLOAT
    draft.finish(draft.op("Squeeze", result, draft.ints(1)))


def _copy_names(value: ir.Value, product: ir.Node) -> None:
    made = value.producer()
    assert made is not None
    made.metadata_props.update(product.metadata_props)


def _chosen_rows(choice: ir.Node) -> ir.Value | None:
    """The expert's number for each row: of Gather itself, or of GatherND behind an Unsqueeze."""
    indices = choice.inputs[1]
    if choice.op_type == "Gather":
        return indices if match.int_attribute(choice, "axis", 0) == 0 else None
    node = match.producer(indices, "Unsqueeze")
    if (
        node is None
        or match.int_attribute(choice, "batch_dims", 0)
        or match.scalar(node.inputs[1]) not in (-1.0, 1.0)
    ):
        return None
    return node.inputs[0]
