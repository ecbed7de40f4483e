"""Codes that a solver chose for a weight, kept with the initializer that holds their values.

The graph stays float until ``quantise``; rounding the dequantised values again would choose other scales. A grid is
good for as long as the initializer holds exactly its values: whatever edits the content drops it. A clone of the
model has it as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompile.graph.edits import constant_array, replace_constant
from qcompile.graph.workspace import Workspace
from qcompile.quant.numerics import QuantizedWeight
from qcompile.quant.schemes import WeightScheme

_KEY, _CORRECTED = "qcompile.grid", "qcompile.corrected"


@dataclasses.dataclass(frozen=True)
class Grid:
    """Codes, their format, and the weight that they stand for, as it was."""

    weight: QuantizedWeight
    scheme: WeightScheme
    before: ir.TensorProtocol


def remember_grid(
    value: ir.Value,
    weight: QuantizedWeight,
    scheme: WeightScheme,
    workspace: Workspace,
    before: ir.TensorProtocol | None = None,
) -> None:
    """Give the initializer ``value`` (K, N) the values of ``weight``, and keep its codes in the workspace.

    before: the float weight, where ``value`` does not hold it any more
    """
    held = before if before is not None else value.const_value
    assert held is not None
    codes = workspace.tensor(weight.codes, f"{value.name}.codes").numpy()
    replace_constant(value, weight.dequantized(), workspace)
    value.meta[_KEY] = Grid(dataclasses.replace(weight, codes=codes), scheme, held)


def correct(value: ir.Value, array: np.ndarray, workspace: Workspace) -> None:
    """Give the initializer ``value`` what makes up for rounded codes; ``forget_grids`` takes it back."""
    before, _ = value.meta.get(_CORRECTED, (value.const_value, None))
    replace_constant(value, array, workspace)
    value.meta[_CORRECTED] = (before, array)


def grid_of(value: ir.Value, scheme: WeightScheme) -> QuantizedWeight | None:
    """The codes of ``value``; None where it has none of ``scheme``, or was edited since."""
    found: Grid | None = value.meta.get(_KEY)
    return found.weight if found is not None and _same_format(found.scheme, scheme) and _holds(value, found) else None


def all_grids(model: ir.Model) -> Iterator[tuple[ir.Value, Grid]]:
    """Every initializer that was given codes, with them; an edit since may have made them void."""
    for value in model.graph.initializers.values():
        if _KEY in value.meta:
            yield value, value.meta[_KEY]


def forget_grids(model: ir.Model) -> None:
    """Give every initializer that still has the values of its codes the weight that they stand for; and take back what
    makes up for them."""
    for value, grid in list(all_grids(model)):
        if _holds(value, grid):
            value.const_value = grid.before
        del value.meta[_KEY]
    for value in model.graph.initializers.values():
        before, after = value.meta.pop(_CORRECTED, (None, None))
        held = constant_array(value)
        if before is not None and held is not None and np.array_equal(held, after):
            value.const_value = before


def _holds(value: ir.Value, grid: Grid) -> bool:
    held = constant_array(value)
    return held is not None and np.array_equal(held, grid.weight.dequantized())


def _same_format(one: WeightScheme, other: WeightScheme) -> bool:
    """``clip`` says how scales are searched, which is done."""
    return one.model_copy(update={"clip": other.clip}) == other
