"""How long a sequence may be: the rows of the learned position table, less those in front that no token reads."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompile.calibration.inputs import UNLIMITED, Input
from qcompile.graph.edits import constant_array
from qcompile.graph.provenance import original_name

_REPEATS = ("Expand", "Tile", "Unsqueeze", "Identity")
_PASS_THROUGH = ("Cast", "Slice", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Identity", "Transpose", "Tile")


def position_limits(model: ir.Model) -> tuple[int, int]:
    """The longest sequences that the smallest and the largest learned position table allow.

    Very large when there is none. Positions that are constant, as those of an image's patches, limit nothing.
    """
    found = [lookup for node in model.graph if (lookup := _lookup(node)) is not None]
    limits = [_allowed(rows, index) for rows, index in found if constant_array(index) is None]
    return min(limits, default=UNLIMITED), max(limits, default=UNLIMITED)


def _lookup(node: ir.Node) -> tuple[int, ir.Value | None] | None:
    """(rows, index) where ``node`` looks up positions: in a learned table, or in GPT-J's sines for each text."""
    if node.op_type == "GatherElements":
        return _repeated_lookup(node)
    if node.op_type == "EmbedLayerNormalization" and node.inputs[3] is not None and node.inputs[3].const_value:
        given = node.inputs[8] if len(node.inputs) > 8 else None
        return int(node.inputs[3].const_value.shape.numpy()[0]), given
    table = node.inputs[0] if node.op_type == "Gather" else None
    if table is None or table.const_value is None or len(table.const_value.shape) != 2:
        return None
    name = original_name(table).lower()
    is_position = ("position" in name and "relative" not in name) or "wpe" in name.split(".")
    return (int(table.const_value.shape.numpy()[0]), node.inputs[1]) if is_position else None


def _repeated_lookup(node: ir.Node) -> tuple[int, ir.Value | None] | None:
    data = table = node.inputs[0]
    while table is not None and (made := table.producer()) is not None and made.op_type in _REPEATS:
        table = made.inputs[0]
    held = table.const_value if table is not None else None
    if held is None or not held.dtype.is_floating_point() or data is None or data.shape is None:
        return None
    axis = node.attributes.get_int("axis", 0)
    from_right = axis - len(data.shape) if axis >= 0 else axis
    if -from_right > len(held.shape):
        return None
    rows = int(held.shape.numpy()[from_right])
    return (rows, node.inputs[1]) if rows > 1 else None


def longest_sequence(model: ir.Model, inputs: Sequence[Input]) -> int:
    """Tokens from which on a sample cannot run; of an encoder and a decoder, those of the larger table."""
    smallest, largest = position_limits(model)
    return largest if any("decoder" in item.name for item in inputs) else smallest


def _allowed(rows: int, index: ir.Value | None) -> int:
    first = _first_position(index)
    if first is None:  # OPT and RoBERTa keep two rows in front, which shows in a size such as 514 or 2050
        first = 2 if rows % 64 == 2 else 0
    return rows - first


def _first_position(index: ir.Value | None) -> int | None:
    """The row that the first token reads, by how ``index`` is computed; None where that is not understood.

    OPT counts from 2, RoBERTa from the padding token's id plus 1, others from 0.
    """
    known = constant_array(index)
    if known is not None:
        return int(known.flat[0]) if known.size and known.dtype.kind in "iu" else None
    if index is None:
        return None
    node = index.producer()
    if node is None:
        return 0 if index.is_graph_input() else None
    if node.op_type == "CumSum":
        return 1
    if node.op_type == "Range":
        return _first_position(node.inputs[0]) or 0
    if node.op_type in _PASS_THROUGH:
        return _first_position(node.inputs[0])
    if node.op_type not in ("Add", "Sub", "Mul"):
        return None
    return _combined(node.op_type, [_first_position(value) for value in node.inputs])


def _combined(operator: str, parts: Sequence[int | None]) -> int | None:
    """Of a product with a mask the larger; an unknown part, such as the length of a cache, counts as 0."""
    left, right = parts
    if left is None and right is None:
        return None
    if operator == "Mul":
        return max(left or 0, right or 0)
    return (left or 0) + (right or 0) if operator == "Add" else (left or 0) - (right or 0)
