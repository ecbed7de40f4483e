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

_KEY = "qcompile.grid"


def remember_grid(
    value: ir.Value, weight: QuantizedWeight, scheme: WeightScheme, workspace: Workspace
) -> None:
    """Give the initializer ``value`` (K, N) the values of ``weight``, and keep its codes in the workspace."""
    codes = workspace.tensor(weight.codes, f"{value.name}.codes").numpy()
    replace_constant(value, weight.dequantized(), workspace)
    value.meta[_KEY] = (dataclasses.replace(weight, codes=codes), scheme)


def grid_of(value: ir.Value, scheme: WeightScheme) -> QuantizedWeight | None:
    """The codes of ``value``; None where it has none of ``scheme``, or was edited since."""
    weight, known = value.meta.get(_KEY, (None, None))
    if weight is None or not _same_format(known, scheme):
        return None
    held = constant_array(value)
    if held is None or not np.array_equal(held, weight.dequantized()):
        return None
    return weight  # type: ignore[no-any-return]


def all_grids(model: ir.Model) -> Iterator[tuple[ir.Value, QuantizedWeight, WeightScheme]]:
    """Every initializer that was given codes, with them; an edit since may have made them void."""
    for value in model.graph.initializers.values():
        if _KEY in value.meta:
            yield value, *value.meta[_KEY]


def _same_format(one: WeightScheme, other: WeightScheme) -> bool:
    """``clip`` says how scales are searched, which is done."""
    return one.model_copy(update={"clip": other.clip}) == other
