"""Codes kept with an initializer: they come back as they were, and go with the first edit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.graph.edits import replace_constant
from qcompile.graph.grids import forget_grids, grid_of, remember_grid
from qcompile.graph.workspace import Workspace
from qcompile.quant.numerics import QuantizedWeight, quantize_weight
from qcompile.quant.schemes import WeightScheme

SCHEMES = (
    WeightScheme(bits=4),
    WeightScheme(bits=3, granularity="group", group_size=32, symmetric=False),
    WeightScheme(bits=3, granularity="group", group_size=48),  # the last group is shorter
)


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    with Workspace() as found:
        yield found


def planted_weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((64, 80)).astype(np.float32)


def planted(workspace: Workspace, scheme: WeightScheme) -> tuple[ir.Model, ir.Value, QuantizedWeight]:
    """A model with one weight (64, 80), its codes those of a solver: not what rounding again would give."""
    w = planted_weight()
    value = ir.Value(name="w", const_value=ir.tensor(w, name="w"))
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21}), ir_version=10)
    rounded = quantize_weight(w, scheme)
    weight = QuantizedWeight(rounded.codes // 2, rounded.scale, rounded.zero_point, rounded.group_size)
    remember_grid(value, weight, scheme, workspace)
    return model, value, weight


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_come_back_and_a_clone_has_them(scheme: WeightScheme, workspace: Workspace) -> None:
    model, value, weight = planted(workspace, scheme)
    again = quantize_weight(weight.dequantized(), scheme)
    assert (again.scale != weight.scale).any(), "rounding again would have done"
    for held in (value, model.clone().graph.initializers["w"]):
        found = grid_of(held, scheme)
        assert found is not None and found.group_size == weight.group_size
        for name in ("codes", "scale", "zero_point"):
            np.testing.assert_array_equal(getattr(found, name), getattr(weight, name))
        assert held.const_value is not None
        np.testing.assert_array_equal(held.const_value.numpy(), found.dequantized())


def test_another_format_has_no_grid(workspace: Workspace) -> None:
    _, value, _ = planted(workspace, SCHEMES[1])
    assert grid_of(value, SCHEMES[1].model_copy(update={"clip": "minmax"})) is not None
    for change in ({"bits": 4}, {"group_size": 16}, {"symmetric": True}):
        assert grid_of(value, SCHEMES[1].model_copy(update=change)) is None
    assert grid_of(ir.Value(name="none"), SCHEMES[1]) is None


def test_an_edit_drops_it_and_leaves_the_clone_alone(workspace: Workspace) -> None:
    model, value, weight = planted(workspace, SCHEMES[0])
    copy = model.clone().graph.initializers["w"]
    changed = weight.dequantized()
    changed[3, 4] += 0.01
    replace_constant(value, changed, workspace)
    assert grid_of(value, SCHEMES[0]) is None
    assert grid_of(copy, SCHEMES[0]) is not None
    copy.const_value = ir.tensor(changed, name="w")
    assert grid_of(copy, SCHEMES[0]) is None


def test_the_float_weights_come_back_but_not_over_an_edit(workspace: Workspace) -> None:
    model, value, weight = planted(workspace, SCHEMES[0])
    copy = model.clone()
    forget_grids(copy)
    restored = copy.graph.initializers["w"]
    assert restored.const_value is not None
    np.testing.assert_array_equal(restored.const_value.numpy(), planted_weight())
    assert grid_of(restored, SCHEMES[0]) is None and grid_of(value, SCHEMES[0]) is not None
    changed = weight.dequantized() + 1
    replace_constant(value, changed, workspace)
    forget_grids(model)
    assert value.const_value is not None
    np.testing.assert_array_equal(value.const_value.numpy(), changed)
