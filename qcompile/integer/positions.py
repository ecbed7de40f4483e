"""Cosines and sines of positions as a table that integers pick rows from.

The float graph computes them from token positions each time; here each is computed once for every position by that
same graph, rounded to 14 places, and looked up.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.calibration.runner import open_session
from qcompile.graph.edits import constant_array
from qcompile.graph.workspace import Workspace
from qcompile.integer.emit import Emitter

PLACES = 14


class NoTable(Exception):
    """The factors do not depend on one tensor of positions alone; the argument says what else is there."""


def factors(value: ir.Value, emit: Emitter, positions: int) -> ir.Value:
    """int32 on 14 places for ``value`` (.., S, d), a cosine or sine of positions below ``positions``."""
    source = _positions(value)
    table = np.rint(_computed(emit.model, emit.workspace, source, value, positions) * 2**PLACES).astype(np.int32)
    top = emit.constant(np.asarray(positions - 1, np.int64), "last_position")
    zero = emit.constant(np.asarray(0, np.int64), "first_position")
    inside = emit.put("Min", [emit.put("Max", [source, zero], ir.DataType.INT64), top], ir.DataType.INT64)
    rank = len(value.shape) if value.shape is not None else 0
    axes = _extra_axes(source, rank)
    if axes:
        inside = emit.put("Squeeze", [inside, emit.int64s(*axes)], ir.DataType.INT64)
    picked = emit.put("Gather", [emit.constant(table, f"{value.name}.table"), inside], axis=0)
    given = len(source.shape or ()) - len(axes)
    missing = rank - (given + 1)
    first = 1 if given > 1 else 0  # behind the batch, where there is one
    return picked if missing <= 0 else emit.put("Unsqueeze", [picked, emit.int64s(*range(first, first + missing))])


def _extra_axes(source: ir.Value, rank: int) -> list[int]:
    """The axes of one that the graph gave the positions to multiply them with the frequencies."""
    shape = list(source.shape or ())
    ones = [axis for axis, size in enumerate(shape) if size == 1]
    return [axis for axis in ones if axis > 0][-1:] if len(shape) == 3 else []


def _positions(value: ir.Value) -> ir.Value:
    """The integers that everything above ``value`` is computed from."""
    found: dict[int, ir.Value] = {}
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if id(current) in seen or constant_array(current) is not None:
            continue
        seen.add(id(current))
        node = current.producer()
        if node is None:
            raise NoTable(f"they come from the input '{current.name}'")
        if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype != ir.DataType.FLOAT:
            found[id(node.inputs[0])] = node.inputs[0]
            continue
        if node.op_type in ("Shape", "Size"):
            continue
        pending.extend(v for v in node.inputs if v is not None)
    if len(found) != 1:
        raise NoTable(f"they come from {len(found)} tensors of integers")
    return next(iter(found.values()))


def _computed(model: ir.Model, workspace: Workspace, source: ir.Value, value: ir.Value, positions: int) -> np.ndarray:
    """(positions, d): what the graph makes of each position. NoTable where one is made of others too."""
    try:
        graph = ir.convenience.extract(model.graph, [source], [value])
    except ValueError as error:
        raise NoTable("they need more than the positions") from error
    for given in graph.inputs:
        given.type = source.type
    part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    session = open_session(workspace.save(part, "positions"))
    shape = [1 if size == 1 else None for size in (source.shape or ())]
    places = [axis for axis, size in enumerate(shape) if size is None]
    layout = [1] * len(shape)

    def run(fed: np.ndarray) -> np.ndarray:
        layout[places[-1] if places else -1] = len(fed)
        result: np.ndarray = session.run(None, {str(graph.inputs[0].name): fed.reshape(layout)})[0]
        if result.size % len(fed) or result.shape.count(len(fed)) == 0:
            raise NoTable("they have no row for each position")
        return result.reshape(len(fed), -1)

    fed = np.arange(positions, dtype=source.dtype.numpy())  # type: ignore[union-attr]
    table = run(fed)
    some = fed[: max(1, positions // 2)][::-1]
    if np.abs(run(np.ascontiguousarray(some)) - table[: len(some)][::-1]).max() > 2.0 ** -(PLACES + 2):
        raise NoTable("they depend on how many positions there are, or on their order")
    return table
